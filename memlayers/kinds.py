"""The kinds of memory: one line each. A new kind is one folder and one line here."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import pydantic

from .associative import AssociativeMemory, AssociativeMemoryConfig
from .cartridge import Cartridge, CartridgeConfig
from .config import ConfigError, MemoryConfig, check_plain, shown, validate
from .core.memory import Memory
from .lora import LoRAMemories, LoRAMemoryConfig
from .neural import NeuralMemories, NeuralMemoryConfig
from .product_key import ProductKeyMemories, ProductKeyMemoryConfig
from .reversible import ReversibleMemory, ReversibleMemoryConfig
from .task_tokens import TaskTokens, TaskTokensConfig
from .tokens import MemoryTokens, MemoryTokensConfig

KINDS: dict[str, tuple[type[MemoryConfig], type[Memory]]] = {
    "tokens": (MemoryTokensConfig, MemoryTokens),
    "reversible": (ReversibleMemoryConfig, ReversibleMemory),
    "associative": (AssociativeMemoryConfig, AssociativeMemory),
    "cartridge": (CartridgeConfig, Cartridge),
    "neural": (NeuralMemoryConfig, NeuralMemories),
    "lora": (LoRAMemoryConfig, LoRAMemories),
    "product_key": (ProductKeyMemoryConfig, ProductKeyMemories),
    "task_tokens": (TaskTokensConfig, TaskTokens),
}


def parse_memory_config(data: Any, where: str = "") -> MemoryConfig:
    """The config that a YAML or JSON block describes, chosen by its `type`.

    Raises:
        ConfigError: unknown or missing `type`, unknown field, wrong value; names the field's full path.
    """
    if isinstance(data, MemoryConfig):
        return data
    check_plain(data, where)
    kind = data.get("type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        near = difflib.get_close_matches(shown(kind), KINDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        path = f"{where}.type" if where else "type"
        raise ConfigError(f"{path}: {shown(kind)} is not a kind of memory; known: {', '.join(KINDS)}{hint}")
    return validate(KINDS[kind][0], data, where)


AnyMemoryConfig = Annotated[
    pydantic.SerializeAsAny[MemoryConfig], pydantic.PlainValidator(lambda data: parse_memory_config(data))
]
"""A field of a larger config that holds any kind of memory."""


def module_class(config: MemoryConfig) -> type[Memory]:
    """The `nn.Module` class that a config describes.

    Raises:
        TypeError: `config` is no memory config.
    """
    if not isinstance(config, MemoryConfig):
        raise TypeError(f"expected a memory config such as MemoryTokensConfig, got {type(config).__name__}")
    return KINDS[config.type][1]
