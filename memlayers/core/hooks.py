"""What stands on a model's own modules once it has memory: a method laid over an instance's, and the hooks made of it.

Objects and not closures, so that a deep copy of the model has hooks of its own and the model can be pickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn

from .call import BLOCK, Block, holding
from .memory import LayerMemory, Memory
from .model import CACHE_NAMES

IGNORED = "keys_to_ignore_at_inference"
"""Field of a config by which HF Trainer knows what of an output is no prediction."""


SEEN: ContextVar[set | None] = ContextVar("memlayers_seen", default=None)
"""Hooks that have found the pass that they are in; kept while `probe` looks."""


def found_by(hook: object) -> None:
    """Note that a hook has found its pass."""
    seen = SEEN.get()
    if seen is not None:
        seen.add(hook)


class MethodOverride:
    """Stands as a method of one module, on the instance, until it is removed.

    Attributes:
        module, name: whose method it is.
        below: what stood on the instance before, or None where it was the class's own.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name, self.removed = module, name, False
        self.below = module.__dict__.get(name)
        module.__dict__[name] = self

    def original(self, *args, **kwargs):
        """The method underneath."""
        if self.below is not None:
            return self.below(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        if (
            args and args[0] is self.module
        ):  # accelerate binds what it finds as `forward` to its module once more
            args = args[1:]
        return self.original(*args, **kwargs) if self.removed else self.call(*args, **kwargs)

    def call(self, *args, **kwargs):
        """What stands in for the method."""
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method underneath: Trainer and `generate` look at it."""
        if self.below is not None:
            return inspect.signature(self.below)
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def by_name(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of a call by their names."""
        if not args:
            return dict(kwargs)
        signature = self.__signature__
        bound = signature.bind_partial(*args, **kwargs)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                return {**bound.arguments, **bound.arguments.pop(parameter.name, {})}
        return dict(bound.arguments)

    def remove(self) -> None:
        """Give the module back what it had. Another override that was put on top keeps its place; so does another
        library's wrapper, which then finds the method underneath."""
        self.removed = True
        top = self.module.__dict__.get(self.name)
        if top is self:
            del self.module.__dict__[self.name]
            if self.below is not None:
                self.module.__dict__[self.name] = self.below
            return
        while isinstance(top, MethodOverride):
            if top.below is self:
                top.below = self.below
                return
            top = top.below


class Uncompiled(MethodOverride):
    """One that runs as it stands under `torch.compile`, with all that it calls."""

    def __new__(cls, *args, **kwargs):
        if not hasattr(
            cls.call, "_torchdynamo_disable"
        ):  # here, because the compiler takes seconds to import
            cls.call = torch.compiler.disable(cls.call)
        return super().__new__(cls)


class PartHook(MethodOverride):
    """One memory around the `forward` of a part of the decoder: an attention, an MLP or a linear layer.

    Attributes:
        memory: whose method `around` says what the part gives out.
        layer: number of the layer that the part is in.
        part: name of the part, which the memory gives a meaning.
    """

    def __init__(self, memory: Memory, module: nn.Module, layer: int, part: str):
        super().__init__(module, "forward")
        self.memory, self.layer, self.part = memory, layer, part

    def call(self, *args, **kwargs):
        block = BLOCK.get()
        if not self.memory.enabled if block is None else block.name_of(self.memory) is None:
            return self.original(*args, **kwargs)
        if block is not None:
            found_by(self)
        elif isinstance(self.memory, LayerMemory):
            raise ValueError(
                f"{self.part} of layer {self.layer} was called by itself, out of a call of its model, so that a memory of kind "
                f"{self.memory.config.type} has no state to read; call the model or its decoder, or leave memory out with "
                "memlayers.disabled(model)"
            )
        return self.memory.around(self, block, args, kwargs)


class LayerHook(MethodOverride):
    """The one hook of a decoder layer: finds the pass that it is in and lets the memories inside the layers work.

    Attributes:
        memories: all memories of the model, the child module that `attach` adds.
        layer: its number.
    """

    def __init__(self, memories: nn.ModuleDict, module: nn.Module, layer: int):
        super().__init__(module, "forward")
        self.memories, self.layer = memories, layer

    def call(self, *args, **kwargs):
        block = BLOCK.get()
        if block is None:
            self._check_none_is_passed_by()
            return self.original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        found_by(self)
        here = [(n, m) for n, m in block.layer_memories if self.layer in m.at_layers]
        for name, memory in here:
            hidden = memory.before_layer(block, name, self.layer, hidden)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        output = self._run(block, args, kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        for name, memory in here:
            memory.after_layer(block, name, self.layer, hidden)
        if self.layer in block.keep_outputs:
            block.outputs[self.layer] = hidden
        return output

    def _run(self, block: Block, args: tuple, kwargs: dict):
        """The layer itself. Gradient checkpointing runs it a second time in the backward pass, out of this call and
        perhaps in another thread, so that it is given the block along with the layer."""
        layer = self.module
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
            return self.original(*args, **kwargs)
        if not getattr(
            layer, "_can_checkpoint_with_cache", False
        ):  # or the second run would change the cache again
            kwargs = {name: None if name in CACHE_NAMES else x for name, x in kwargs.items()}
            kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
        own = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
        forward = self.below or partial(own, layer)
        return layer._gradient_checkpointing_func(partial(_in_block, block, forward, kwargs), *args)

    def _check_none_is_passed_by(self) -> None:
        passed = [n for n, m in self.memories.items() if isinstance(m, LayerMemory) and m.enabled]
        if passed:
            raise ValueError(
                f"layer {self.layer} was called by itself, out of a call of its model, so that memory {passed[0]!r} has no "
                "state to read; call the model or its decoder, or leave memory out with memlayers.disabled(model)"
            )


class IgnoredKey:
    """The output's `memory_state` among the keys of the config that HF Trainer takes for no prediction."""

    def __init__(self, model: nn.Module):
        self.config = model.config
        setattr(self.config, IGNORED, [*getattr(self.config, IGNORED, ["past_key_values"]), "memory_state"])

    def remove(self) -> None:
        """Give the config back what it had."""
        ignored = list(getattr(self.config, IGNORED, []))
        if "memory_state" in ignored:  # once: another model may have the same config
            ignored.remove("memory_state")
        self.config.__dict__.pop(IGNORED, None)
        if ignored != getattr(self.config, IGNORED, ["past_key_values"]):
            setattr(self.config, IGNORED, ignored)


def part_hooks(module: nn.Module) -> Iterator[PartHook]:
    """The hooks on a part of a model, from the outermost in."""
    hook = vars(module).get("forward")
    while isinstance(hook, MethodOverride):
        if isinstance(hook, PartHook):
            yield hook
        hook = hook.below


def _in_block(block: Block, forward, kwargs: dict, *args):
    with holding(BLOCK, block):
        return forward(*args, **kwargs)


def checkpoint_safe(
    layer: nn.Module, hidden: torch.Tensor, read: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden`, the input of a layer, and `read`, which enters in the middle of it, such that the gradient of `read` is
    found too where reentrant checkpointing runs the layer again."""
    if not (recomputes_reentrant(layer) and read.requires_grad):
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


def recomputes_reentrant(layer: nn.Module) -> bool:
    """Whether the backward pass will run this layer again under reentrant checkpointing."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
