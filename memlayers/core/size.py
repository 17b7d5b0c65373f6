"""Whether a memory fits into this machine: its bytes are counted before any is allocated."""

from __future__ import annotations

import psutil
import torch
from torch import nn

from ..config import ConfigError, MemoryConfig
from .memory import Memory, StatefulMemory

ROWS = 4
"""States that are counted beside the parameters: trying a memory writes and keeps that many rows."""


def check_fits(need: int, told: str) -> None:
    """Raise ConfigError where `need` bytes are more than this machine has free; `told` begins with the field and ends
    with what it is that takes them."""
    free = psutil.virtual_memory().available
    if need > free:
        raise ConfigError(f"{told} takes {need:,} bytes, {free:,} are free")


def check_size(kind: type[Memory], config: MemoryConfig, model: nn.Module) -> None:
    """Build the memory and its state without data, on torch's `meta` device, and count them.

    What cannot be built there is not counted: building it in earnest says what is wrong, if anything is; and a state may
    come out of the model that the memory is not in yet.

    Raises:
        ConfigError: more bytes than are free, names the field that is furthest above its default; or what `for_model`
            raises.
    """
    with torch.random.fork_rng([]), torch.device("meta"):
        try:
            memory = kind.for_model(config, model)
        except RuntimeError as error:
            if "meta" in str(error):
                return
            raise
        try:
            state = memory.new_state(ROWS) if isinstance(memory, StatefulMemory) else {}
        except (RuntimeError, AttributeError):
            state = {}
    tensors = [*memory.state_dict().values(), *state.values()]
    largest = max(tensors, key=lambda tensor: tensor.nbytes, default=None)
    if largest is not None:
        check_fits(
            sum(tensor.nbytes for tensor in tensors),
            f"{_suspect(config)}: lower it, or the fields that it is multiplied with: a memory of kind {config.type} with "
            f"{ROWS} rows of its state, the largest tensor of which is {tuple(largest.shape)},",
        )


def _suspect(config: MemoryConfig) -> str:
    """The field with whole numbers that is the most times its default."""
    times = {}
    for name, field in type(config).model_fields.items():
        value, default = _number(getattr(config, name)), _number(field.default)
        if value is not None:
            times[name] = value / (default or 1)
    return max(times, key=times.get, default="type")


def _number(value: object) -> int | None:
    if isinstance(value, list):
        return max((_number(item) or 0 for item in value), default=None)
    return value if type(value) is int else None
