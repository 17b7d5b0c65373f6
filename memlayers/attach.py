"""Putting memories into a Hugging Face model and taking them out again.

The model object stays what it was: its class, parameter names and tensors do not change. It gains one child
module, `memlayers`, that holds the memories, and functions that stand over methods of its instance: see
`memlayers.core.methods`. `detach` removes all of it.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import torch
from torch import nn

from .config import ConfigError, MemoryConfig
from .core.follow import follow, remove_strays
from .core.memory import Memory, StatefulMemory
from .core.methods import override_methods
from .core.model import (
    ROOT,
    Memories,
    base_parameters,
    check_present,
    decoder_of,
    device_of,
    disabled,
    max_positions,
    memories,
    unwrap,
)
from .core.probe import probe
from .core.size import check_size
from .core.snapshot import Snapshot
from .core.state import PENDING
from .errors import first_line, says_no_memory
from .kinds import module_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "detach", "disabled"]


def attach(
    model: PreTrainedModel,
    config: MemoryConfig,
    name: str | None = None,
    *,
    freeze_base: bool = True,
    try_it: bool = True,
) -> Memory:
    """Put a memory into `model`, in place. Where it raises, the model is bit for bit what it was.

    Args:
        model: a decoder-only model with its language-model head.
        config: which kind, and its fields.
        name: what to call it; the kind's `type` by default. Letters, digits, `_` and `-`.
        freeze_base: stop the gradient of the base parameters (with the first memory); `detach` undoes it.
        try_it: run a few tokens through the model to see that the memory is read, written and decoded with; what was
            tried once on an architecture is not tried again in this process.

    Returns:
        The memory, a trainable `nn.Module` on the model's device, in float32.

    Raises:
        TypeError: not a Hugging Face decoder-only model, or not a memory config.
        ValueError: the name is taken or not usable.
        ConfigError: the config does not fit this model, names the field; or the memory does not work in this
            architecture, says what was missing.
    """
    kind = module_class(config)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "the model is in DistributedDataParallel already, which would not synchronise the gradients of a memory; attach "
            "first, then wrap it (accelerator.prepare, Trainer)"
        )
    model = unwrap(model)
    decoder_of(model)
    name = config.type if name is None else name
    _check_name(model, name)
    before = Snapshot(model)
    with torch.inference_mode(False):
        return _attach(model, kind, config, name, before, freeze_base, try_it)


def _attach(model, kind, config, name: str, before: Snapshot, freeze_base: bool, try_it: bool) -> Memory:
    try:
        check_size(kind, config, model)
        memory = kind.for_model(config, model)
        if isinstance(memory, StatefulMemory):
            _check_schedule(model, name, memory)
            _check_positions(model, name, memory)
        _put(model, memory.to(device_of(model)), name, freeze_base)
        if try_it:
            probe(model, name)
    except BaseException as error:
        before.restore()
        if says_no_memory(error):
            told = "this machine has not enough memory for it beside the model"
            raise ConfigError(f"type: a memory of kind {config.type}: {told} ({first_line(error)})") from None
        raise
    return memory


def detach(model: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
    """Take one memory, or all, out of `model`; without memories it is bit for bit the model it was.

    Returns:
        What was given, or the model inside of what `torch.compile` returns, which has no truth value of its own.

    Raises:
        KeyError: no memory of that name.
    """
    present = memories(model)
    check_present(present, [] if name is None else [name])
    given, model = model, unwrap(model)
    root = getattr(model, ROOT, None)
    for each in [name] if name is not None else list(present):
        for handle in root.handles.pop(each)[::-1]:
            handle.remove()
        del root[each]
    if root is not None:
        remove_strays(model)
    if root is not None and not len(root):
        for hook in root.hooks[::-1]:
            hook.remove()
        for parameter_name, parameter in base_parameters(model):
            parameter.requires_grad_(root.base_requires_grad.get(parameter_name, parameter.requires_grad))
        delattr(model, ROOT)
    return model if hasattr(given, "_orig_mod") else given


def _put(model: nn.Module, memory: Memory, name: str, freeze_base: bool) -> None:
    if not hasattr(model, ROOT):
        root = Memories(key=uuid.uuid4().hex)
        model.add_module(ROOT, root)
        for parameter_name, parameter in base_parameters(model):
            root.base_requires_grad[parameter_name] = parameter.requires_grad
            if freeze_base:
                parameter.requires_grad_(False)
        override_methods(model, root)
    root = getattr(model, ROOT)
    follow(model)
    root[name] = memory
    root.handles[name] = memory.install(model)


def _check_name(model: nn.Module, name: str) -> None:
    if name in memories(model):
        raise ValueError(
            f"this model already has a memory named {name!r}; detach it first or choose another name"
        )
    if not name or name == PENDING or not name.replace("-", "_").isidentifier() or hasattr(Memories, name):
        raise ValueError(f"{name!r} cannot name a memory: use letters, digits, '_' and '-', not {PENDING!r}")


def _check_schedule(model: PreTrainedModel, name: str, memory: StatefulMemory) -> None:
    """Memories of one model are written alike, by reading or by gradient steps, and share one schedule."""
    for other_name, other in memories(model).items():
        if not isinstance(other, StatefulMemory):
            continue
        both = [(name, memory), (other_name, other)]
        if (memory.gradient_writer is None) != (other.gradient_writer is None):
            taught = next(n for n, m in both if m.gradient_writer is not None)
            raise ConfigError(
                f"{name}: memory {taught!r} is written by gradient steps and cannot stand beside one that is written "
                "by reading; detach one of them"
            )
        mine, theirs = memory.schedule, other.schedule
        if (mine.kv == "drop") != (theirs.kv == "drop"):
            streams, segments = sorted(both, key=lambda item: item[1].schedule.kv == "drop")
            raise ConfigError(
                f"{name}: memory {streams[0]!r} changes with every token, memory {segments[0]!r} reads in segments; "
                "one model cannot do both. Give the first placement mac and the same segment_length"
            )
        if mine.reach != theirs.reach:
            field, of = ("segment_length", "memories of one model read the same segments")
            if mine.kv != "drop":
                field, of = ("sliding_window", "attention of one model has one window")
            raise ConfigError(
                f"{name}.{field}: {mine.reach} differs from {theirs.reach} of memory {other_name!r}; {of}"
            )


def _check_positions(model: PreTrainedModel, name: str, memory: StatefulMemory) -> None:
    limit, reach = max_positions(model), memory.schedule.reach
    if limit is None or memory.schedule.kv != "drop":
        return
    if memory.n_extra_tokens >= limit:
        raise ConfigError(
            f"{name}.n_tokens: {memory.config.n_tokens} memory tokens take {memory.n_extra_tokens} places in a segment, the "
            f"model has {limit} positions; none is left to the text"
        )
    if reach + memory.n_extra_tokens > limit:
        raise ConfigError(
            f"{name}.segment_length: a segment of {reach} tokens and its memory tokens take "
            f"{reach + memory.n_extra_tokens} positions, the model has {limit}"
        )
