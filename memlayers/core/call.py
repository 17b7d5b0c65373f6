"""The call under way: what a model or `write` asks of its memories, and each pass of the decoder that serves it.

A call and its passes are held in context variables, so that two threads that use one model do not see each other's, and
so that a layer finds its pass whatever keywords its architecture hands on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import MemoryCache
from .memory import LayerMemory, Memory, StatefulMemory
from .schedule import Schedule
from .state import Fields


@dataclass
class Call:
    """One call of a decoder with memory.

    Attributes:
        decoder, layers: the stack of layers that it is for.
        memories: the enabled memories that keep a state, by name; all of one schedule.
        others: the enabled memories that keep none.
        cache: carries state, keys and values in, and out to the next call.
        write: False gives back the state as it was read: while decoding, segments that fill up are left unwritten.
        flush: also write the open segment at the end.
        keep_kv: keep keys and values for the next call.
        blocks_keep_kv: whether blocks may hand keys and values on; gradient checkpointing drops them.
        mask: (batch, tokens) bool for the new tokens, False at padding; None: known only to the decoder.
        done: whether the decoder has served it.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    memories: Mapping[str, StatefulMemory]
    others: Mapping[str, Memory]
    cache: MemoryCache
    write: bool = True
    flush: bool = False
    keep_kv: bool = False
    blocks_keep_kv: bool = True
    mask: torch.Tensor | None = None
    done: bool = False

    @property
    def schedule(self) -> Schedule:
        """How the text is cut."""
        return next(iter(self.memories.values())).schedule


@dataclass
class Block:
    """One pass of the decoder: a block of tokens, the state before it and what becomes of it.

    Attributes:
        call: the call that it serves.
        fields: the memories' fields before it, by name.
        mask: (batch, columns) bool, False at padding.
        writes: whether what is read is written too, for memories that read in segments.
        window: where keys and values are kept, or None.
        active: (batch,) bool, rows that have a token in this block; the others keep their memory. None: all.
        write_at: columns of the tokens with which a memory writes, by memory; the block's last token for those without.
        segment, segment_mask: embeddings (batch, tokens, hidden_size) of a segment without what stands around it, and its
            mask; None where nothing does.
        keep_outputs: layers whose outputs are kept in `outputs`.
        after: fields after it; filled while it runs.
        outputs: what layers gave out, by layer.
        reads: what a layer has read before it runs, by memory and what of it: a layer, or a field of the state.
        masks: what a memory made of a mask of attention, which layers share; by memory, id and keys before.
    """

    call: Call
    fields: Mapping[str, Fields] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    writes: bool = True
    window: Cache | None = None
    active: torch.Tensor | None = None
    write_at: Mapping[str, slice] = field(default_factory=dict)
    segment: torch.Tensor | None = None
    segment_mask: torch.Tensor | None = None
    keep_outputs: frozenset[int] = frozenset()
    after: dict[str, Fields] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    reads: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    masks: dict[tuple[str, int, int], tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)

    def name_of(self, memory: Memory) -> str | None:
        """The name under which `memory` takes part, or None."""
        both = (self.call.memories, self.call.others)
        return next((name for named in both for name, other in named.items() if other is memory), None)

    @property
    def layer_memories(self) -> list[tuple[str, LayerMemory]]:
        """Those inside the layers, in the order in which they were attached."""
        return [(name, m) for name, m in self.call.memories.items() if isinstance(m, LayerMemory)]

    def put(self, name: str, fields: Fields) -> None:
        """Set fields of a memory after this block; the others stay as they were before it."""
        self.after.setdefault(name, dict(self.fields[name])).update(fields)


CALL: ContextVar[Call | None] = ContextVar("memlayers_call", default=None)
"""A call that its model has begun and its decoder has not taken yet."""
BLOCK: ContextVar[Block | None] = ContextVar("memlayers_block", default=None)
"""The pass under way."""


@contextlib.contextmanager
def holding(variable: ContextVar, value) -> Iterator[None]:
    """`variable` at `value` within the block, in this thread alone."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
