"""`MemoryCache`: what a `MemoryState` rides on in `generate`, with the keys and values of the open window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from .state import MemoryState


class MemoryCache(Cache):
    """A `MemoryState` and the keys and values of the open window.

    `get_seq_length` counts all tokens seen through this cache, as `generate` expects, also those that have
    left the window.

    Attributes:
        memory_state: the state after the last forward call; None before the first.
        window: keys and values of the open window; None when it is empty.
        window_mask: (batch, columns of `window`) bool, False at padding.
        seen: columns (padding included) given to the model through this cache.
        rows_per_state: rows of the input, one after the other, that read one row of the state; 1 but inside of writers.
        owner: key of the model whose keys and values are in `window`; None before the first call.
        written_by_reading: whether tokens that were read are in the state, so that they cannot be cropped.
    """

    def __init__(self, memory_state: MemoryState | None = None, rows_per_state: int = 1):
        super().__init__(layers=[])
        self.memory_state = memory_state
        self.window: Cache | None = None
        self.window_mask: torch.Tensor | None = None
        self.seen = 0
        self.rows_per_state = rows_per_state
        self.owner: str | None = None
        self.written_by_reading = True

    @staticmethod
    def of(past: Cache | None) -> MemoryCache:
        """The memory cache that a caller gave, or a new one. An empty cache of transformers becomes one in place, so that
        the caller's own `reset`, `reorder_cache` and `get_seq_length` act on memory too.

        Raises:
            ValueError: a cache that holds tokens already, or of a class that is not from transformers.
        """
        if past is None:
            return MemoryCache()
        if isinstance(past, MemoryCache):
            return past
        if type(past).__module__ != Cache.__module__:
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, which cannot carry memory; give state.to_cache(), an empty "
                "DynamicCache, or none"
            )
        if past.layers and past.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values holds {past.get_seq_length()} tokens read without memory; start with "
                "state.to_cache(), or with no cache"
            )
        past.__class__ = MemoryCache
        past.__init__()
        return past

    def __bool__(self) -> bool:
        return (
            True  # with no layers of its own it would be empty, and memory lost to `cache or DynamicCache()`
        )

    def update(self, *args, **kwargs):
        raise ValueError(
            "past_key_values is a MemoryCache, but this model has no memory to read it; give a plain cache or none"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.window is not None:
            return self.window.get_mask_sizes(query_length, layer_idx)
        return self.seen + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return not self.written_by_reading and (self.window is None or self.window.is_croppable)

    @property
    def is_sliding(self) -> list[bool]:
        return [] if self.window is None else self.window.is_sliding

    @property
    def batch_size(self) -> int:
        state = self.memory_state
        return state.batch_size if state is not None and state.batch_size is not None else -1

    def _rows(self, index: torch.Tensor) -> None:
        if self.memory_state is not None:
            self.memory_state = self.memory_state.select(index)
        if self.window_mask is not None:
            self.window_mask = self.window_mask.index_select(0, index.to(self.window_mask.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.window is not None:
            self.window.reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.window is not None:
            self.window.batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.window is not None:
            self.window.batch_repeat_interleave(repeats)
        if self.memory_state is not None:
            self.memory_state = self.memory_state.repeat_interleave(repeats)
        if self.window_mask is not None:
            self.window_mask = self.window_mask.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """As new: no memory, no tokens."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number, as in transformers), where memory only reads.

        Raises:
            NotImplementedError: what was read is in memory.
        """
        if self.written_by_reading:
            raise NotImplementedError(
                "a memory cannot forget the last tokens it has read, so a MemoryCache cannot be cropped. Assisted and "
                "prompt-lookup decoding need crop: use greedy, sampling or beam search. To go back yourself, keep "
                "state.clone() from before and start again from its to_cache()."
            )
        if self.window is not None:
            self.window.crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)
