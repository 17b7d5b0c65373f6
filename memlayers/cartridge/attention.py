"""Keys and values before those of the text, as attention takes them: in place of its cache, and in its mask."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..core.masks import expand_mask, to_attention_mask


class KeysBefore:
    """Stands for the cache of one call of attention; the text's own keys go to the cache `below`, where there is one.

    Args:
        keys, values: (rows, heads, places, head_dim).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, below: Cache | KeysBefore | None):
        self.keys, self.values, self.below = keys, values, below

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`."""
        if self.below is not None:
            keys, values = self.below.update(keys, values, layer_idx, *args, **kwargs)
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys there are before a call."""
        return self.keys.shape[2] + (0 if self.below is None else self.below.get_seq_length(layer_idx))


def shared(x: torch.Tensor, rows_per_state: int) -> torch.Tensor:
    """x (rows, ...) with each row as often as rows of the input read it."""
    return x if rows_per_state == 1 else x.repeat_interleave(rows_per_state, dim=0)


def mask_before(
    mask: torch.Tensor | None,
    length: torch.Tensor,
    places: int,
    hidden: torch.Tensor,
    previous: int,
    config: PreTrainedConfig,
) -> torch.Tensor:
    """The mask of a call of attention, with the last `length` of `places` columns before it seen by all tokens.

    Args:
        mask: (rows or 1, 1, queries, keys), or None where all that is not in the future is seen.
        length: (rows,).
        hidden: (rows, queries, hidden_size), what attention is given.
        previous: keys of the text there are before those of the queries.

    Raises:
        ValueError: an implementation of attention that takes no mask of ours.
    """
    rows, n_queries = hidden.shape[:2]
    mask = expand_mask(mask, n_queries, previous, config, hidden, who="a cartridge")
    used = torch.arange(places, device=length.device) >= places - length[:, None]
    used = to_attention_mask(used[:, None, None].expand(-1, -1, n_queries, -1), config, hidden)
    return torch.cat([used, mask.expand(rows, -1, -1, -1)], dim=-1)
