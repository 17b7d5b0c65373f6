"""`write`: read a text of any length into memory, piece by piece, at constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .core.cache import MemoryCache
from .core.checks import check_state
from .core.masks import padding_last, positions_of
from .core.memory import fresh_state
from .core.model import (
    decoder_of,
    device_of,
    max_positions,
    memories,
    reach,
    stateful,
    unwrap,
    written_by_gradient,
)
from .core.state import PENDING, MemoryState

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
        state: continue from here; default: a fresh state. It holds memory alone: where every token is read as it passes,
            attention starts anew, and its first tokens do not see those before them.
        attention_mask: (batch, tokens), 0 at padding.
        close: write the last, open segment too. With False its tokens stay in the state as they are, and the
            next call continues them. Memories that read without segments leave nothing open.
        differentiable: keep the graph from what is learned to the state, to train how a memory is written. Only for
            memories that are written by gradient steps; the others are trained through forward calls.
        progress: show a progress bar.

    Returns:
        The new state; `state` is unchanged.

    Raises:
        ValueError: no memory to write to, no token to write, a state of other rows or another memory; or, where
            memories read without segments and without a sliding window, more tokens than the model has positions.
    """
    model, reading = unwrap(model), stateful(model)
    if not reading:
        present = sorted(memories(model)) or "none"
        raise ValueError(
            f"nothing to write to: no enabled memory keeps a state; this model's memories are {present}"
        )
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be (batch, tokens) with at least one token, got {shape}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ"
        )
    if attention_mask is not None and not attention_mask.any():
        raise ValueError("attention_mask has no token to write, all is padding")
    check_state(reading, state, input_ids.shape[0])
    if written_by_gradient(model):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        state = state or fresh_state(reading, input_ids.shape[0])
        given = (input_ids, mask.bool(), state)
        options = {"differentiable": differentiable, "progress": progress}
        return state.replace({n: m.write(model, n, *given, **options) for n, m in reading.items()})
    if differentiable:
        raise ValueError(
            "differentiable: this model's memories are written by forward calls; take output.memory_state of "
            "model(input_ids, close_memory=True) instead"
        )
    schedule = next(iter(reading.values())).schedule
    rows = Rows(input_ids, attention_mask, state) if schedule.kv == "drop" else None
    pieces = (
        _whole_segments(rows, schedule.reach, close) if rows else _tokens(model, input_ids, attention_mask)
    )
    cache, decoder, device = MemoryCache(state), decoder_of(model), device_of(model)
    total = rows.width if rows else input_ids.shape[1]
    with torch.no_grad(), tqdm(total=total, unit="token", desc="write", disable=not progress) as bar:
        for n_tokens, tensors, flags in pieces:
            decoder(**{name: x.to(device) for name, x in tensors.items()}, **flags, past_key_values=cache)
            bar.update(n_tokens)
    return cache.memory_state


def _whole_segments(rows: Rows, segment_length: int, close: bool) -> Iterator[tuple[int, dict, dict]]:
    """Some segments a piece; no keys and values pass between them."""
    step, start = SEGMENTS_PER_CALL * segment_length, 0
    while start < rows.width:
        stop = min((max(start, rows.longest_pending) // step + 1) * step, rows.width)
        ids, mask = rows.columns(start, stop)
        flags = {"use_cache": False, "close_memory": close or stop < rows.first_end}
        yield stop - start, {"input_ids": ids, "attention_mask": mask}, flags
        start = stop


def _tokens(model, input_ids, attention_mask) -> Iterator[tuple[int, dict, dict]]:
    """Some tokens a piece; keys and values stay until the text ends."""
    n_tokens, limit = input_ids.shape[1], max_positions(model)
    if reach(model) is None and limit is not None and n_tokens > limit:
        raise ValueError(
            f"{n_tokens:,} tokens are more than the {limit:,} positions that attention reaches in this model; give the "
            "memory a sliding_window or a segment_length, or write pieces: state = ml.write(model, piece, state)"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = positions_of(mask)
    for start in range(0, n_tokens, TOKENS_PER_CALL):
        stop = min(start + TOKENS_PER_CALL, n_tokens)
        tensors = {"input_ids": input_ids[:, start:stop], "attention_mask": mask[:, :stop]}
        yield stop - start, {**tensors, "position_ids": positions[:, start:stop]}, {"use_cache": True}


class Rows:
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
            self.order, self.n_real = padding_last(real), real.sum(1, keepdim=True)
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
