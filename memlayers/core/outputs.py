"""What a call gives out: the decoder's output of its own class, put together of its blocks, with memory beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import cache

import torch

from .call import Call
from .state import MemoryState


@cache
def _class_with_state(output_class: type) -> type:
    """An output class of transformers with a field `memory_state`, so that what takes an output apart and puts it together
    again (DDP, pytree, accelerate) finds the state among its fields."""
    fields = [("memory_state", "MemoryState | None", field(default=None))]
    namespace = {
        "__reduce__": lambda output: (_output_of, (output_class, dict(output.items()))),
        "__module__": __name__,
    }
    return make_dataclass(
        f"{output_class.__name__}WithMemory", fields, bases=(output_class,), namespace=namespace
    )


def _output_of(output_class: type, items: dict):
    return _class_with_state(output_class)(**items)


def with_state(output, state: MemoryState):
    """An output of transformers with `memory_state` beside its own fields."""
    return _output_of(type(output), {**output, "memory_state": state})


def per_token(outputs, piece) -> dict:
    """What the decoder gives out for each token, at the text's tokens."""
    found = {"last_hidden_state": piece.at_text(outputs.last_hidden_state)}
    if outputs.get("hidden_states"):
        found["hidden_states"] = tuple(piece.at_text(x) for x in outputs.hidden_states)
    if outputs.get("router_logits"):  # one row a token and batch row, in a mixture of experts
        rows = len(piece.tokens)
        found["router_logits"] = tuple(
            piece.at_text(x.reshape(rows, -1, x.shape[-1])) for x in outputs.router_logits
        )
    return found


def joined(parts: list, restore: Callable[[torch.Tensor], torch.Tensor]):
    """One output of all blocks: a tensor, or a tuple with one a layer."""
    if isinstance(parts[0], tuple):
        return tuple(joined(list(layer), restore) for layer in zip(*parts, strict=True))
    if parts[0] is None:
        return None
    return restore(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])


def connected(call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """`hidden`, in training connected with all that the memories learn: a text too short to be written, or to read what
    was, gives a gradient of zero, so that a loss can be differentiated and all processes of DDP wait for the same."""
    if not (torch.is_grad_enabled() and call.decoder.training):
        return hidden
    learning = [p for memory in call.memories.values() for p in memory.parameters() if p.requires_grad]
    return _Connect.apply(hidden, *learning) if learning else hidden


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, *parameters):
        ctx.parameters = parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.parameters)
