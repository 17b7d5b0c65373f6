"""How a decoder runs with memories that every token changes, inside its layers.

There are no segments: all tokens of a call run together, attention works as it does in the base, or in a sliding
window where the memory's config asks for one. Keys and values are on the cache beside the state, and go when the
cache goes: what a `MemoryState` alone brings back is memory. Positions and masks are the caller's, as in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .memory import Memory
from .passes import Pass
from .state import MemoryCache, MemoryState

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CACHE_NAMES = ("past_key_values", "layer_past")
"""What architectures call the cache among the arguments of attention."""
BLOCK = 128
"""Tokens that run together under a sliding window, at least: attention costs tokens × (block + window)."""


@dataclass
class Request:
    """What one forward call asks of this way of reading.

    Attributes:
        memories: the enabled memories that stream, by name.
        config: of the decoder.
        write: False gives back the state as it was.
        keep_window: keep keys and values for the next call.
        sliding_window: tokens that attention reaches, itself included; None: as in the base.
        in_blocks: a sliding window may be run block by block; not where gradient checkpointing drops keys and
            values.
        absolute_positions: positions are looked up in a table of the model, not turned.
    """

    memories: Mapping[str, Memory]
    config: PreTrainedConfig
    write: bool = True
    keep_window: bool = False
    sliding_window: int | None = None
    in_blocks: bool = True
    absolute_positions: bool = False


def fresh_state(memories: Mapping[str, Memory], rows: int) -> MemoryState:
    """The state before anything was read."""
    return MemoryState({name: memory.new_state(rows) for name, memory in memories.items()})


def read(
    forward: Callable[..., BaseModelOutputWithPastAndCrossAttentions],
    embeds: torch.Tensor,
    mask: torch.Tensor,
    cache: MemoryCache,
    request: Request,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Run `embeds` through the decoder and leave the new state on `cache`.

    Args:
        forward: the decoder's own forward.
        embeds: input embeddings, (batch, tokens, hidden_size).
        mask: (batch, tokens) bool, False at padding.
        cache: carries the state, keys and values in and out.
        request: what to write and keep.
        attention_mask: the caller's, for all tokens so far.
        position_ids: the caller's; None: columns are counted, padding included, as in the base.

    Returns:
        The decoder's output.
    """
    state = cache.memory_state or fresh_state(request.memories, embeds.shape[0])
    fields = {name: state[name] for name in request.memories}
    position_ids = _behind(request, fields, embeds, cache.seen, position_ids)
    if request.sliding_window is None:
        if cache.window is None and request.keep_window:
            cache.window = DynamicCache(config=request.config)
        run = Pass(request.memories, fields, mask)
        output = forward(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache.window,
            use_cache=cache.window is not None,
            memory_pass=run,
            **kwargs,
        )
        hidden, after = (output.last_hidden_state, *(output.hidden_states or ())), run.after
    else:
        hidden, after = _read_in_window(forward, embeds, mask, cache, request, fields, position_ids, **kwargs)
    if request.write:
        cache.memory_state = MemoryState({**state.fields, **after})
    else:
        cache.memory_state = state
    cache.seen += embeds.shape[1]
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden[0],
        past_key_values=cache if request.keep_window else None,
        hidden_states=hidden[1:] or None,
    )


def _behind(request: Request, fields, embeds, seen: int, position_ids):
    """Positions of the text, behind those that memories take for themselves."""
    taken = [memory.positions(fields[name]) for name, memory in request.memories.items()]
    taken = [positions for positions in taken if positions is not None]
    if not taken:
        return position_ids
    if position_ids is None:
        position_ids = seen + torch.arange(embeds.shape[1], device=embeds.device)[None]
    before = sum(taken).to(embeds.device)
    position_ids = position_ids + before.repeat_interleave(embeds.shape[0] // len(before))[:, None]
    _check_positions(position_ids, request)
    return position_ids


def _read_in_window(forward, embeds, mask, cache, request: Request, fields, position_ids, **kwargs):
    """The same under a sliding window: block by block, each with the keys and values that the window still holds."""
    if position_ids is None:
        position_ids = cache.seen + torch.arange(embeds.shape[1], device=embeds.device)[None]
    _check_positions(position_ids, request)
    window, window_mask = cache.window or DynamicCache(), cache.window_mask
    if window_mask is None:
        window_mask = mask[:, :0]
    n_tokens = embeds.shape[1]
    size = max(request.sliding_window, BLOCK) if request.in_blocks else n_tokens
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, n_tokens, size):
        here = slice(start, start + size)
        run = Pass(request.memories, fields, mask[:, here])
        window_mask = torch.cat([window_mask, mask[:, here]], dim=1)
        single = start == 0 and n_tokens <= size and not request.keep_window and window.get_seq_length() == 0
        output = forward(
            inputs_embeds=embeds[:, here],
            attention_mask=sliding_masks(
                request.config, window_mask, run.mask.shape[1], request.sliding_window, embeds
            ),
            position_ids=position_ids[:, here],
            past_key_values=None if single else window,
            use_cache=not single,
            memory_pass=run,
            **kwargs,
        )
        fields = run.after
        parts.append((output.last_hidden_state, *(output.hidden_states or ())))
        window_mask = _slide(window, window_mask, request.sliding_window - 1)
    if request.keep_window:
        cache.window, cache.window_mask = window, window_mask
    return tuple(torch.cat(layer, dim=1) for layer in zip(*parts, strict=True)), fields


def sliding_masks(
    config: PreTrainedConfig, mask: torch.Tensor, n_queries: int, sliding_window: int, like: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Masks of attention that reaches `sliding_window` tokens back, or the model's own window where that is less.

    Args:
        mask: (batch, keys) bool, False at padding; the last `n_queries` keys are the queries' own.
        like: a tensor of the model's dtype.

    Returns:
        (batch, 1, queries, keys): bool for `sdpa`, additive for `eager`; one a layer type where the model has several.

    Raises:
        ValueError: another implementation of attention.
    """
    own = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ["sliding_attention" if own else "full_attention"])
    masks = {}
    for layer_type in types:
        reach = min(sliding_window, own) if own and layer_type == "sliding_attention" else sliding_window
        masks[layer_type] = as_attention_takes_it(_window(mask, n_queries, reach), config, like)
    return masks if len(masks) > 1 else masks.popitem()[1]


def _window(mask: torch.Tensor, n_queries: int, reach: int) -> torch.Tensor:
    key = torch.arange(mask.shape[1], device=mask.device)
    query = key[-n_queries:, None]
    near = (key <= query) & (key > query - reach)
    return (near & mask[:, None, None, :]) | (
        key == query
    )  # padding sees itself: no row of a softmax is empty


def as_attention_takes_it(
    allowed: torch.Tensor, config: PreTrainedConfig, like: torch.Tensor
) -> torch.Tensor:
    implementation = config._attn_implementation
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)
    raise ValueError(
        f"sliding_window: attention {implementation!r} takes no mask of ours; load the model with "
        "attn_implementation='sdpa' or 'eager'"
    )


def written_out(
    mask: torch.Tensor | None,
    n_queries: int,
    previous: int,
    config: PreTrainedConfig,
    like: torch.Tensor,
    who: str,
) -> torch.Tensor:
    """The mask of a call of attention as a tensor, (rows or 1, 1, queries, keys).

    Args:
        mask: as attention is given it; None where all that is not in the future is seen.
        previous: keys there are before those of the queries.
        like: a tensor of the model's dtype and device.
        who: needs it, for the error.

    Raises:
        ValueError: an implementation of attention whose mask has another form.
    """
    if mask is None:
        seen = torch.ones(n_queries, previous + n_queries, dtype=torch.bool, device=like.device)
        return as_attention_takes_it(seen.tril(previous)[None, None], config, like)
    if mask.dim() != 4:
        raise ValueError(
            f"{who} needs a mask of four dimensions, attention {config._attn_implementation!r} has one of {mask.dim()}; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    return mask


def _slide(window: DynamicCache, mask: torch.Tensor, keep: int) -> torch.Tensor:
    """Drop keys and values that no later token can reach; the mask of those that are left."""
    for layer in window.layers:
        if layer.get_seq_length() > keep:
            layer.keys, layer.values = (t[:, :, t.shape[2] - keep :] for t in (layer.keys, layer.values))
    return mask[:, max(mask.shape[1] - keep, 0) :]


def _check_positions(position_ids: torch.Tensor, request: Request) -> None:
    limit = getattr(request.config, "max_position_embeddings", None)
    if request.absolute_positions and limit is not None and int(position_ids.max()) >= limit:
        raise ValueError(
            f"the text reaches position {int(position_ids.max())}, the model has a table of {limit}; write it in "
            f"pieces of at most {limit} tokens: state = ml.write(model, piece, state)"
        )
