"""Masks of attention and positions: the forms they come in, and lining up the real tokens of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .state import Fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) int64: each real token's number in its row, for a mask (batch, tokens), 0 or False at padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def none_if_full(mask: torch.Tensor) -> torch.Tensor | None:
    """A mask that hides nothing is no mask: attention then takes its faster path."""
    return None if mask.all() else mask.long()


def padding_first(mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) int64, columns in an order that puts padding, wherever it stands, before the real tokens."""
    return mask.int().argsort(dim=1, stable=True)


def padding_last(mask: torch.Tensor) -> torch.Tensor:
    """The same with padding behind them."""
    return (~mask).int().argsort(dim=1, stable=True)


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
        masks[layer_type] = to_attention_mask(_window(mask, n_queries, reach), config, like)
    return masks if len(masks) > 1 else masks.popitem()[1]


def _window(mask: torch.Tensor, n_queries: int, reach: int) -> torch.Tensor:
    key = torch.arange(mask.shape[1], device=mask.device)
    query = key[-n_queries:, None]
    near = (key <= query) & (key > query - reach)
    return (near & mask[:, None, None, :]) | (
        key == query
    )  # padding sees itself: no row of a softmax is empty


def to_attention_mask(allowed: torch.Tensor, config: PreTrainedConfig, like: torch.Tensor) -> torch.Tensor:
    implementation = config._attn_implementation
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)
    raise ValueError(
        f"sliding_window: attention {implementation!r} takes no mask of ours; load the model with "
        "attn_implementation='sdpa' or 'eager'"
    )


def expand_mask(
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
        return to_attention_mask(seen.tril(previous)[None, None], config, like)
    if mask.dim() != 4:
        raise ValueError(
            f"{who} needs a mask of four dimensions, attention {config._attn_implementation!r} has one of {mask.dim()}; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    return mask


def slide(window: Cache, mask: torch.Tensor, keep: int) -> torch.Tensor:
    """Drop keys and values that no later token can reach; the mask of those that are left."""
    for layer in window.layers:
        if isinstance(layer, DynamicLayer) and layer.get_seq_length() > keep:
            layer.keys, layer.values = (t[:, :, t.shape[2] - keep :] for t in (layer.keys, layer.values))
    return mask[:, max(mask.shape[1] - keep, 0) :]


def used_columns(pending: Fields) -> torch.Tensor:
    """(batch, width) bool: which columns of the right-aligned pending tokens hold one."""
    width = pending["embeds"].shape[1]
    column = torch.arange(width, device=pending["length"].device)
    return column >= width - pending["length"][:, None]
