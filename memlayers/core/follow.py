"""Hooks that follow what they stand on: PEFT puts modules around the parts of a model, copies parts and takes them out."""

from __future__ import annotations

import threading

from torch import nn

from .hooks import MethodOverride
from .model import ROOT, Memories

_lock = threading.Lock()


def follow(model: nn.Module) -> None:
    """Put the hooks of the memories again where the adapters of `model` are others than when they were put. A memory so
    stands around all that PEFT adds to a part, whichever came first, and stays when an adapter is merged or unloaded.

    Raises:
        ValueError: PEFT has copied a part with a memory inside of it; the copy has none.
    """
    root = getattr(model, ROOT, None)
    if not isinstance(root, Memories) or _same(root.adapters, _adapters(model)):
        return
    with _lock:
        now = _adapters(model)
        if _same(root.adapters, now):
            return
        for name in list(root.handles)[::-1]:
            for handle in root.handles.pop(name)[::-1]:
                handle.remove()
        remove_strays(model)
        for name, memory in root.items():
            root.handles[name] = memory.install(model)
        _check_none_inside_a_copy(model, root)
        root.adapters = now


def remove_strays(model: nn.Module) -> None:
    """Take away the hooks that came onto a part when it was copied."""
    root = getattr(model, ROOT)
    known = {*root.hooks, *(hook for hooks in root.handles.values() for hook in hooks)}
    for module in model.modules():
        hook = vars(module).get("forward")
        while isinstance(hook, MethodOverride):
            if hook not in known:
                hook.remove()
            hook = hook.below


def _adapters(model: nn.Module) -> tuple:
    """What tells adapters from others: PEFT's dictionary of them, a new one for a new injection, and its keys."""
    configs = getattr(model, "peft_config", None) or None
    return configs, tuple(configs or ())


def _same(one: tuple, other: tuple) -> bool:
    return one[0] is other[0] and one[1] == other[1]


def _check_none_inside_a_copy(model: nn.Module, root: Memories) -> None:
    hooked = {hook.module: name for name, hooks in root.handles.items() for hook in hooks}
    for where, module in model.named_modules():
        if "original_module" not in module._modules or "modules_to_save" not in module._modules:
            continue
        for part, inner in module.original_module.named_modules():
            if inner in hooked:
                raise ValueError(
                    f"PEFT keeps a copy of {where} (modules_to_save), and memory {hooked[inner]!r} stands inside of it, at "
                    f"{part or where}: the copy would run without; leave {where.rsplit('.', 1)[-1]} out of modules_to_save"
                )
