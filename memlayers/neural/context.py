"""Memory as context: attention over the tokens and what memory holds for each of them (Titans section 4.1).

Before every token stands what memory holds for it, at the same position, so that a causal mask keeps the future
out; before all stand the persistent tokens, at position 0. Only the tokens' own outputs are used.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ..core.hooks import PartHook
from ..core.masks import expand_mask
from ..core.model import CACHE_NAMES


def in_context(
    hook: PartHook,
    args: tuple,
    kwargs: dict,
    read: torch.Tensor,
    persistent: torch.Tensor,
    window: Cache | None,
    place: int,
    config: PreTrainedConfig,
) -> torch.Tensor:
    """What attention gives out for the tokens when memory stands in its context, (batch, tokens, hidden_size).

    Args:
        hook: on the attention, whose own forward it knows.
        args, kwargs: of the call without memory.
        read: (batch, tokens, hidden_size), one memory token a token.
        persistent: (n_persistent_tokens, hidden_size).
        window: cache of the open window, None where none is kept.
        place: number of the cache's layer that is ours.
        config: of the decoder, for the implementation of attention.

    Raises:
        ValueError: an implementation of attention that takes no mask of ours.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    before = _kept(window, place)
    n_tokens, n_persistent = hidden.shape[1], len(persistent)
    previous = (before - n_persistent) // 2 if before else 0
    new = 0 if before else n_persistent
    sequence = torch.stack([read, hidden], dim=2).flatten(1, 2)
    lead = persistent[:new].to(hidden.dtype).expand(len(hidden), -1, -1)
    mask = expand_mask(kwargs.get("attention_mask"), n_tokens, previous, config, hidden, who="placement: mac")
    changed = {"attention_mask": _doubled(mask, n_persistent, new)}
    if kwargs.get("position_embeddings") is not None:
        cos, sin = kwargs["position_embeddings"]
        start = cos[:, :1].expand(-1, new, -1)
        changed["position_embeddings"] = (
            torch.cat([torch.ones_like(start), cos.repeat_interleave(2, dim=1)], dim=1),
            torch.cat([torch.zeros_like(start), sin.repeat_interleave(2, dim=1)], dim=1),
        )
    if kwargs.get("position_ids") is not None:
        ids = kwargs["position_ids"].repeat_interleave(2, dim=1)
        changed["position_ids"] = torch.cat([ids.new_zeros(len(ids), new), ids], dim=1)
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            changed[name] = _Place(window, place)
    sequence = torch.cat([lead, sequence], dim=1)
    if args:
        output = hook.original(sequence, *args[1:], **{**kwargs, **changed})
    else:
        output = hook.original(**{**kwargs, **changed, "hidden_states": sequence})
    output = output[0] if isinstance(output, tuple) else output
    return output[:, new + 1 :: 2]


def _kept(window: Cache | None, place: int) -> int:
    """Keys that the open window already has in this place."""
    if window is None or len(window.layers) <= place:
        return 0
    return window.layers[place].get_seq_length()


def _doubled(mask: torch.Tensor, n_persistent: int, new: int) -> torch.Tensor:
    """The mask of the tokens, (batch, 1, queries, keys), for the tokens with memory before each.

    A memory token is seen where its token is; the `n_persistent` keys before all are seen by all. The last `new`
    of them are queries too, whose outputs nobody uses.
    """
    doubled = mask.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    seen = torch.full_like(doubled[..., :1], True if mask.dtype == torch.bool else 0.0)
    doubled = torch.cat([seen.expand(*doubled.shape[:-1], n_persistent), doubled], dim=-1)
    return torch.cat([doubled[..., :1, :].expand(-1, -1, new, -1), doubled], dim=-2)


class _Place:
    """One layer of a cache under any layer number: attention keeps its keys and values there."""

    def __init__(self, window: Cache, place: int):
        self.window, self.place = window, place

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`, in our place."""
        missing = self.place + 1 - len(self.window.layers)
        self.window.layers.extend(DynamicLayer() for _ in range(missing))
        return self.window.update(keys, values, self.place, *args, **kwargs)
