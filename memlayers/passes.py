"""`Pass`: what one pass of the decoder carries for memories that sit inside its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache

from .memory import Fields, Memory


@dataclass
class Pass:
    """State in and state out of memories inside the layers, handed to the decoder as the keyword `memory_pass`.

    Layers hand their keywords on, so that the pass is there again when gradient checkpointing runs a layer twice.

    Attributes:
        memories: the memories that take part, by name.
        before: their fields before the pass.
        mask: (batch, tokens) bool, False at padding.
        writes: whether what is read is written too, for memories that read in segments.
        window: where keys and values of the open window are kept, or None.
        active: (batch,) bool, rows that have a token in this segment; the others keep their memory. None: all.
        write_at: columns of the tokens with which a memory writes behind a segment, by memory; the last token of the
            segment for those without.
        after: their fields after it; filled while it runs.
        reads: what a layer has read before it runs, by memory and what of it: a layer, or a field of the state.
        masks: a mask of attention and what a memory made of it, which layers share; by memory, id and keys before.
    """

    memories: Mapping[str, Memory]
    before: Mapping[str, Fields]
    mask: torch.Tensor
    writes: bool = True
    window: Cache | None = None
    active: torch.Tensor | None = None
    write_at: Mapping[str, slice] = field(default_factory=dict)
    after: dict[str, Fields] = field(default_factory=dict)
    reads: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    masks: dict[tuple[str, int, int], tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)

    def name_of(self, memory: Memory) -> str | None:
        """The name under which `memory` takes part, or None."""
        return next((name for name, other in self.memories.items() if other is memory), None)


def carried(block: nn.Module, hidden: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden`, the input of a layer, and `read`, which enters in the middle of it, such that the gradient of `read` is
    found too where reentrant checkpointing runs the layer again."""
    if not (recomputes_reentrant(block) and read.requires_grad):
        return hidden, read
    leaf = read.detach().requires_grad_()
    return _Carried.apply(hidden, read, leaf), leaf


class _Carried(torch.autograd.Function):
    """Hands the gradient of `leaf` on to `read`, of which it is a detached copy, along the way of `hidden`.

    Reentrant checkpointing runs a layer again in the backward pass and differentiates only its arguments. What
    was read enters in the middle of the layer; as a leaf it collects its gradient there, and this function, which
    stands before the layer, passes it on when the layer's own backward pass is done.
    """

    @staticmethod
    def forward(ctx, hidden, read, leaf):
        ctx.leaf = leaf
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.leaf.grad, None


def recomputes_reentrant(block: nn.Module) -> bool:
    """Whether the backward pass will run this layer again under reentrant checkpointing."""
    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return False
    return getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
