"""`write`: read a text of any length into memory, piece by piece, at constant memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from . import segments, streaming
from .forward import check_state, streaming_request
from .model import by_gradient, decoder_layers, decoder_of, max_positions, memories, segmented, stateful
from .state import PENDING, MemoryCache, MemoryState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEGMENTS_PER_CALL = 16
TOKENS_PER_CALL = 1024


def write(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    state: MemoryState | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    close: bool = True,
    differentiable: bool = False,
    progress: bool = False,
) -> MemoryState:
    """Read `input_ids` and return what is remembered. No keys and values kept; no gradient unless asked for.

    Args:
        model: a model with at least one memory that keeps a state.
        input_ids: (batch, tokens) int64, on any device; moved to the model's piece by piece.
        state: continue from here; default: a fresh state. It holds memory alone: where memories stream, attention
            starts anew, and its first tokens do not see those before them.
        attention_mask: (batch, tokens), 0 at padding.
        close: write the last, open segment too. With False its tokens stay in the state as they are, and the
            next call continues them. Memories that stream leave nothing open.
        differentiable: keep the graph from what is learned to the state, to train how a memory is written. Only for
            memories that are written by gradient steps; the others are trained through forward calls.
        progress: show a progress bar.

    Returns:
        The new state; `state` is unchanged.

    Raises:
        ValueError: no memory to write to, no token to write, a state of other rows or another memory; or, where
            memories stream without a sliding window, more tokens than the model has positions.
    """
    reading = stateful(model)
    if not reading:
        raise ValueError(
            f"nothing to write to: this model's memories are {sorted(memories(model)) or 'none'}"
        )
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be (batch, tokens) with at least one token, got {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ"
        )
    check_state(reading, state, input_ids.shape[0])

    if by_gradient(model):
        options = {"differentiable": differentiable, "progress": progress}
        return _write_by_gradient(model, reading, input_ids, attention_mask, state, **options)
    if differentiable:
        raise ValueError(
            "differentiable: this model's memories are written by forward calls; take output.memory_state of "
            "model(input_ids, close_memory=True) instead"
        )
    with torch.no_grad():
        if segmented(model):
            return _write_segments(model, input_ids, attention_mask, state, close, progress)
        return _write_stream(model, input_ids, attention_mask, state, progress)


def _write_segments(model, input_ids, attention_mask, state, close: bool, progress: bool) -> MemoryState:
    decoder, device = decoder_of(model), model.get_input_embeddings().weight.device
    reading = segmented(model)
    cache, stream = MemoryCache(state), _Stream(input_ids, attention_mask, state)
    step = SEGMENTS_PER_CALL * next(iter(reading.values())).segment_length
    bar = tqdm(total=stream.width, unit="token", desc="write", disable=not progress)
    start = 0
    while start < stream.width:
        stop = min((max(start, stream.longest_pending) // step + 1) * step, stream.width)
        ids, mask = stream.columns(start, stop)
        cache.request = segments.Request(
            reading,
            decoder_layers(decoder),
            close=close or stop < stream.first_end,
            max_positions=max_positions(model),
        )
        decoder(
            input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=False
        )
        bar.update(stop - start)
        start = stop
    bar.close()
    return cache.memory_state


def _write_stream(model, input_ids, attention_mask, state, progress: bool) -> MemoryState:
    decoder, device = decoder_of(model), model.get_input_embeddings().weight.device
    request = streaming_request(model, write=True, keep_window=True)
    n_tokens, limit = input_ids.shape[1], max_positions(model)
    if request.sliding_window is None and limit is not None and n_tokens > limit:
        raise ValueError(
            f"{n_tokens:,} tokens are more than the {limit:,} positions that attention reaches in this model; give the "
            "memory a sliding_window or a segment_length, or write pieces: state = ml.write(model, piece, state)"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = MemoryCache(state)
    bar = tqdm(total=n_tokens, unit="token", desc="write", disable=not progress)
    for start in range(0, n_tokens, TOKENS_PER_CALL):
        stop = min(start + TOKENS_PER_CALL, n_tokens)
        cache.request = request
        decoder(
            input_ids=input_ids[:, start:stop].to(device),
            attention_mask=mask[:, :stop].to(device),
            position_ids=positions[:, start:stop].to(device),
            past_key_values=cache,
        )
        bar.update(stop - start)
    bar.close()
    return cache.memory_state


def _write_by_gradient(model, reading, input_ids, attention_mask, state, **options) -> MemoryState:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    state = state or streaming.fresh_state(reading, input_ids.shape[0])
    fields = dict(state.fields)
    for name, memory in reading.items():
        fields[name] = memory.write(model, name, input_ids, mask.bool(), state, **options)
    return MemoryState(fields)


class _Stream:
    """The rows as columns in which each row's real tokens stand right behind its pending ones, without
    padding between, so that segments end at the same columns in all rows."""

    def __init__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, state: MemoryState | None
    ):
        self.input_ids = input_ids
        rows, n_tokens = input_ids.shape
        self.order, self.n_real = None, torch.full((rows, 1), n_tokens, device=input_ids.device)
        if attention_mask is not None and not attention_mask.all():
            real = attention_mask.to(input_ids.device).bool()
            self.order, self.n_real = (~real).int().argsort(dim=1, stable=True), real.sum(1, keepdim=True)
        pending = state[PENDING]["length"] if state is not None else torch.zeros(rows, dtype=torch.int64)
        self.n_pending = pending.to(input_ids.device)[:, None]
        self.width = int((self.n_pending + self.n_real).max())
        self.first_end = int((self.n_pending + self.n_real).min())
        self.longest_pending = int(self.n_pending.max())

    def columns(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of columns `start` to `stop`, (batch, stop - start), and which of them are new tokens."""
        place = torch.arange(start, stop, device=self.input_ids.device) - self.n_pending
        new = (place >= 0) & (place < self.n_real)
        place = place.clamp(0, self.input_ids.shape[1] - 1)
        return self.input_ids.gather(1, place if self.order is None else self.order.gather(1, place)), new
