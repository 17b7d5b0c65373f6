"""The segment loop: how a decoder reads an input longer than its window.

A row's tokens, counted from its first real one, are cut into segments of `segment_length`. Each segment
runs on its own as [read tokens ; segment ; write tokens], with positions from 0 and no keys or values from
the segment before; memory is all that passes on. The last segment stays open: its tokens are *pending* in
the state, the next call continues them, and they are written when the segment is full and another token
comes, or when the call closes it. So a text may be split over calls anywhere and gives the same result.

Rows of different length are lined up at the end, so that all open segments run together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .memory import Fields, Memory
from .passes import Pass
from .segment_plan import Plan, take
from .state import PENDING, MemoryCache, MemoryState


@dataclass
class Request:
    """What one forward call asks of the segment loop.

    Attributes:
        memories: the enabled memories that read in segments, all of one `segment_length`.
        layers: the decoder's layers, from whose outputs memory is written.
        write: write full segments; False while decoding.
        close: also write the open segment at the end of the call.
        keep_window: keep keys and values of the open segment for the next call.
        max_positions: positions the model has, or None if it names no limit.
    """

    memories: Mapping[str, Memory]
    layers: nn.ModuleList
    write: bool = True
    close: bool = False
    keep_window: bool = False
    max_positions: int | None = None

    @property
    def segment_length(self) -> int:
        return next(iter(self.memories.values())).segment_length


def fresh_state(memories: Mapping[str, Memory], embeds: torch.Tensor) -> MemoryState:
    """The state before anything was read, for the rows, width, dtype and device of `embeds`."""
    rows, _, width = embeds.shape
    pending = {
        "embeds": embeds.new_zeros(rows, 0, width),
        "length": torch.zeros(rows, dtype=torch.int64, device=embeds.device),
    }
    return MemoryState({**{name: m.new_state(rows) for name, m in memories.items()}, PENDING: pending})


def read(
    forward: Callable[..., BaseModelOutputWithPastAndCrossAttentions],
    embeds: torch.Tensor,
    mask: torch.Tensor,
    cache: MemoryCache,
    request: Request,
    **kwargs,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Run `embeds` through the decoder in segments and leave the new state on `cache`.

    Args:
        forward: the decoder's own forward.
        embeds: input embeddings, (batch, tokens, hidden_size).
        mask: (batch, tokens) bool, False at padding, wherever it stands.
        cache: carries the state and the open window in and out.
        request: what to write and keep.

    Returns:
        The decoder's output with hidden states at the places of `embeds`, zero at padding.
    """
    state = cache.memory_state or fresh_state(request.memories, embeds)
    pending = state[PENDING]
    fits = bool((pending["length"] + mask.sum(1)).max() <= request.segment_length)
    if cache.window is not None and not request.close and (fits or not request.write):
        output = _continue_window(forward, embeds, mask, cache, request, **kwargs)
        pending = _append(pending, embeds, mask)
        cache.memory_state = MemoryState({**state.fields, PENDING: pending})
    else:
        output = _run_segments(forward, embeds, mask, state, cache, request, **kwargs)
    cache.seen += embeds.shape[1]
    return output


def _continue_window(forward, embeds, mask, cache: MemoryCache, request: Request, **kwargs):
    """The new tokens still belong to the open segment, whose keys and values are there."""
    cache.window_mask = torch.cat([cache.window_mask, mask], dim=1)
    _check_positions(cache.window_mask.shape[1], request)
    positions = _positions(cache.window_mask)[:, -embeds.shape[1] :]
    inside = _in_layers(request.memories)
    if inside:
        kwargs["memory_pass"] = Pass(
            inside, cache.memory_state.fields, mask, writes=False, window=cache.window
        )
    output = forward(
        inputs_embeds=embeds,
        attention_mask=_or_none(cache.window_mask),
        position_ids=positions,
        past_key_values=cache.window,
        use_cache=True,
        **kwargs,
    )
    return _output(output.last_hidden_state, cache, output.hidden_states)


def _run_segments(forward, embeds, mask, state: MemoryState, cache: MemoryCache, request: Request, **kwargs):
    pending = state[PENDING]
    source = torch.cat([pending["embeds"].to(embeds.dtype), embeds], dim=1)
    source_mask = torch.cat([_used(pending), mask], dim=1)
    size = request.segment_length if request.write or request.close else source.shape[1]
    plan = Plan.of(source_mask, size)
    tokens, filled = plan.arrange(source, source_mask)

    fields = {name: state[name] for name in request.memories}
    hidden: list[tuple[torch.Tensor, ...]] = []
    cache.window = cache.window_mask = None
    for index in range(plan.n_segments):
        here = slice(index * size, (index + 1) * size)
        last = index == plan.n_segments - 1
        keep = last and request.keep_window and not request.close
        writes = request.close or not last
        window = DynamicCache() if keep else None
        outputs, fields, aligned = _one_segment(
            forward, tokens[:, here], filled[:, here], fields, request, writes, window, **kwargs
        )
        if keep:
            cache.window, cache.window_mask = window, aligned
        if not last:
            fields = _truncate(fields, request.memories, plan.n_segments - 1 - index)
        hidden.append(outputs)

    if request.close:
        pending = {"embeds": embeds[:, :0], "length": torch.zeros_like(pending["length"])}
    else:
        pending = {"embeds": tokens[:, (plan.n_segments - 1) * size :], "length": plan.last_length}
    cache.memory_state = MemoryState({**state.fields, **fields, PENDING: pending})
    layers = [plan.restore(torch.cat(parts, dim=1), embeds.shape[1]) for parts in zip(*hidden, strict=True)]
    return _output(layers[0], cache if request.keep_window else None, tuple(layers[1:]) or None)


def _one_segment(forward, segment, segment_mask, fields, request: Request, writes: bool, window, **kwargs):
    """[read ; segment ; write] through the decoder.

    Returns:
        hidden states of the segment (the last ones, then those of all layers if asked for), the memories'
        new fields, and the mask of the sequence as it ran.
    """
    inside, dtype = _in_layers(request.memories), segment.dtype
    memories = {name: memory for name, memory in request.memories.items() if name not in inside}
    reads = [memory.read(fields[name]) for name, memory in memories.items()]
    writers = _writers(request.memories, fields) if writes else {}
    sequence = torch.cat(
        [*(tokens.to(dtype) for tokens, _ in reads), segment, *(w.to(dtype) for w in writers.values())], 1
    )
    always = segment_mask.new_ones(len(segment), 1)
    used = [used for _, used in reads]
    mask = torch.cat([*used, segment_mask, *(always.expand(-1, w.shape[1]) for w in writers.values())], 1)
    start = sum(tokens.shape[1] for tokens, _ in reads)
    stop = start + segment.shape[1]
    write_at = dict.fromkeys(request.memories, slice(stop - 1, stop))
    for name, writer in writers.items():
        write_at[name] = slice(stop, stop + writer.shape[1])
        stop += writer.shape[1]
    _check_positions(sequence.shape[1], request)

    inverse = None
    if not mask.all():
        order = mask.int().argsort(dim=1, stable=True)
        inverse = order.argsort(dim=1)
        sequence, mask = take(sequence, order), mask.gather(1, order)
    active = segment_mask.any(1)
    # Behind the mask's holes come the real tokens in their order, so that the last columns are the writers' still.
    run = Pass(inside, fields, mask, writes, window, active, write_at)
    if inside:
        kwargs["memory_pass"] = run
    with _outputs_of(request.layers, {memory.write_layer for memory in memories.values()}) as written_by:
        output = forward(
            inputs_embeds=sequence,
            attention_mask=_or_none(mask),
            position_ids=_positions(mask),
            past_key_values=window,
            use_cache=window is not None,
            **kwargs,
        )
    shown = [output.last_hidden_state, *(output.hidden_states or ())]
    if inverse is not None:
        shown = [take(hidden, inverse) for hidden in shown]
        written_by = {layer: take(hidden, inverse) for layer, hidden in written_by.items()}

    new_fields = {**fields, **run.after}
    for name, memory in memories.items():
        if writes and memory.from_text:
            new_fields[name] = memory.update(fields[name], segment, segment_mask)
        elif writes:
            written = written_by[memory.write_layer][:, write_at[name]]
            new_fields[name] = memory.update(fields[name], written, active)
    return tuple(hidden[:, start : start + segment.shape[1]] for hidden in shown), new_fields, mask


def _in_layers(memories: Mapping[str, Memory]) -> dict[str, Memory]:
    """Those that sit inside the layers; the others are tokens before and after a segment."""
    return {name: memory for name, memory in memories.items() if memory.in_layers}


def _writers(memories: Mapping[str, Memory], fields: Mapping[str, Fields]) -> dict[str, torch.Tensor]:
    """The tokens behind a segment, of those memories that write with some."""
    found = {name: memory.write_inputs(fields[name]) for name, memory in memories.items()}
    return {name: tokens for name, tokens in found.items() if tokens is not None}


@contextlib.contextmanager
def _outputs_of(layers: nn.ModuleList, chosen: set[int]) -> Iterator[dict[int, torch.Tensor]]:
    """What the chosen decoder layers give out while the block runs, by layer: (batch, tokens, hidden_size)."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int):
        def hook(module, args, output):
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in chosen]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _output(hidden, cache, hidden_states) -> BaseModelOutputWithPastAndCrossAttentions:
    """GPT-2 asks its decoder's output for `cross_attentions`; no other model minds that field."""
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden, past_key_values=cache, hidden_states=hidden_states
    )


def _truncate(fields: dict[str, Fields], memories: Mapping[str, Memory], to_end: int) -> dict[str, Fields]:
    """Cut the gradient between segments: `bptt_segments` of them stay connected, counted from the end."""
    cut = {}
    for name, part in fields.items():
        length = memories[name].config.bptt_segments
        detach = length is not None and to_end % length == 0
        cut[name] = {f: t.detach() for f, t in part.items()} if detach else part
    return cut


def _append(pending: Fields, embeds: torch.Tensor, mask: torch.Tensor) -> Fields:
    tokens = torch.cat([pending["embeds"].to(embeds.dtype), embeds], dim=1)
    used = torch.cat([_used(pending), mask], dim=1)
    if not mask.all():
        tokens = take(tokens, used.int().argsort(dim=1, stable=True))
    return {"embeds": tokens, "length": used.sum(1)}


def _used(pending: Fields) -> torch.Tensor:
    """(batch, width) bool: which columns of the right-aligned pending tokens hold one."""
    width = pending["embeds"].shape[1]
    column = torch.arange(width, device=pending["length"].device)
    return column >= width - pending["length"][:, None]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _or_none(mask: torch.Tensor) -> torch.Tensor | None:
    """A mask that hides nothing is no mask: attention then takes its faster path."""
    return None if mask.all() else mask.long()


def _check_positions(width: int, request: Request) -> None:
    if request.max_positions is not None and width > request.max_positions:
        raise ValueError(
            f"the open segment with its memory tokens has {width} tokens, the model has positions for "
            f"{request.max_positions}; lower segment_length or n_tokens, or generate fewer tokens"
        )
