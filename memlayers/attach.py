"""Putting memories into a Hugging Face model and taking them out again.

The model object stays what it was: its class, parameter names and tensors do not change. It gains one child
module, `memlayers`, that holds the memories, and three of its methods are covered by functions on the
instance: `forward` of the model (takes and returns a state), `forward` of its decoder (reads in segments)
and `prepare_inputs_for_generation` (tells prompt from generated tokens). `detach` removes all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from .config import ConfigError, MemoryConfig
from .forward import cover, uncover
from .kinds import module_class
from .memory import Memory
from .model import ROOT, Memories, bare, base_parameters, decoder_of, max_positions, memories
from .state import PENDING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(
    model: PreTrainedModel, config: MemoryConfig, name: str | None = None, *, freeze_base: bool = True
) -> Memory:
    """Put a memory into `model`, in place.

    Args:
        model: a decoder-only model with its language-model head.
        config: which kind, and its fields.
        name: what to call it; the kind's `type` by default. Letters, digits, `_` and `-`.
        freeze_base: stop the gradient of the base parameters (with the first memory); `detach` undoes it.

    Returns:
        The memory, a trainable `nn.Module` on the model's device, in float32.

    Raises:
        TypeError: not a Hugging Face decoder-only model, or not a memory config.
        ValueError: the name is taken or not usable.
        ConfigError: the config does not fit this model; names the field.
    """
    kind, model = module_class(config), bare(model)
    decoder = decoder_of(model)
    name = config.type if name is None else name
    _check_name(model, name)
    memory = kind.for_model(config, model)
    _check_reading(model, name, memory)
    if memory.segment_length is not None:
        _check_segments(model, name, memory)
    memory.to(model.get_input_embeddings().weight.device)
    if not memories(model):
        model.add_module(ROOT, Memories())
        cover(model, decoder)
        root = getattr(model, ROOT)
        for parameter_name, parameter in base_parameters(model):
            root.base_requires_grad[parameter_name] = parameter.requires_grad
            if freeze_base:
                parameter.requires_grad_(False)
    root = getattr(model, ROOT)
    root[name] = memory
    root.handles[name] = memory.install(model)
    return memory


def detach(model: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
    """Take one memory, or all, out of `model`; without memories it is bit for bit the model it was.

    Raises:
        KeyError: no memory of that name.
    """
    present = memories(model)
    _check_present(present, [] if name is None else [name])
    wrapper, model = model, bare(model)
    root = getattr(model, ROOT, None)
    for each in [name] if name is not None else list(present):
        for handle in root.handles.pop(each):
            handle.remove()
        del root[each]
    if root is not None and not len(root):
        for parameter_name, parameter in base_parameters(model):
            parameter.requires_grad_(root.base_requires_grad.get(parameter_name, parameter.requires_grad))
        delattr(model, ROOT)
        uncover(model, decoder_of(model))
    return wrapper


@contextlib.contextmanager
def disabled(model: nn.Module, *names: str):
    """Run the model without the named memories, or without any when none is named.

    Raises:
        KeyError: no memory of that name.
    """
    present = memories(model)
    _check_present(present, names)
    chosen = [present[name] for name in names or present]
    before = [memory.enabled for memory in chosen]
    for memory in chosen:
        memory.enabled = False
    try:
        yield model
    finally:
        for memory, enabled in zip(chosen, before, strict=True):
            memory.enabled = enabled


def _check_present(present: dict[str, Memory], names: Iterable[str]) -> None:
    for name in names:
        if name not in present:
            raise KeyError(f"no memory named {name!r} in this model; it has {sorted(present) or 'none'}")


def _check_name(model: nn.Module, name: str) -> None:
    if name in memories(model):
        raise ValueError(
            f"this model already has a memory named {name!r}; detach it first or choose another name"
        )
    if not name or name == PENDING or not name.replace("-", "_").isidentifier() or hasattr(Memories, name):
        raise ValueError(f"{name!r} cannot name a memory: use letters, digits, '_' and '-', not {PENDING!r}")


def _check_reading(model: PreTrainedModel, name: str, memory: Memory) -> None:
    """Memories of one model either all read in segments or all stream, in one sliding window; those that are written by
    gradient steps stand beside their like."""
    for other_name, other in memories(model).items():
        both = [(name, memory), (other_name, other)]
        if memory.by_gradient != other.by_gradient and memory.keeps_state and other.keeps_state:
            taught = next(n for n, m in both if m.by_gradient)
            raise ConfigError(
                f"{name}: memory {taught!r} is written by gradient steps and cannot stand beside one that is written "
                "by reading; detach one of them"
            )
        streams = [n for n, m in both if m.streams]
        segments = [n for n, m in both if m.segment_length is not None]
        if streams and segments:
            raise ConfigError(
                f"{name}: memory {streams[0]!r} changes with every token, memory {segments[0]!r} reads in segments; "
                "one model cannot do both. Give the first placement mac and the same segment_length"
            )
        if memory.streams and other.streams and memory.sliding_window != other.sliding_window:
            raise ConfigError(
                f"{name}.sliding_window: {memory.sliding_window} differs from {other.sliding_window} of memory "
                f"{other_name!r}; attention of one model has one window"
            )


def _check_segments(model: PreTrainedModel, name: str, memory: Memory) -> None:
    for other_name, other in memories(model).items():
        if other.segment_length not in (None, memory.segment_length):
            raise ConfigError(
                f"{name}.segment_length: {memory.segment_length} differs from {other.segment_length} of memory "
                f"{other_name!r}; memories of one model read the same segments"
            )
    limit, need = max_positions(model), memory.segment_length + memory.n_extra_tokens
    if limit is not None and memory.n_extra_tokens >= limit:
        raise ConfigError(
            f"{name}.n_tokens: {memory.config.n_tokens} memory tokens take {memory.n_extra_tokens} places in a segment, the "
            f"model has {limit} positions; none is left to the text"
        )
    if limit is not None and need > limit:
        raise ConfigError(
            f"{name}.segment_length: a segment of {memory.segment_length} tokens and its memory tokens take "
            f"{need} positions, the model has {limit}"
        )
