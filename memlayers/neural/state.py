"""The state of a neural memory as named tensors: what they are, how they are checked, how the kernel sees them."""

from __future__ import annotations

import torch

from memlayers.kernels.chunk_memory import ChunkState

from ..core.memory import FLOATS
from ..core.state import Fields
from .config import NeuralMemoryConfig
from .rules import RULES


def layer_shapes(config: NeuralMemoryConfig, head_dim: int) -> list[tuple[int, int]]:
    """(d_in, d_out) of each layer of a head's memory."""
    if config.depth == 1:
        return [(head_dim, head_dim)]
    hidden = config.expansion * head_dim
    return [(head_dim, hidden), (hidden, head_dim)]


def state_shapes(config: NeuralMemoryConfig, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Shape of each field without the batch: those of `ChunkState`, and

    * conv (conv_kernel - 1, 3 · heads · head_dim): the last inputs of the convolutions; absent without one,
    * position (): tokens in the open chunk, 0 to chunk_size - 1; int64,
    * rule (): the code of the rule that wrote; int64.
    """
    weights = {str(i): (config.heads, *shape) for i, shape in enumerate(layer_shapes(config, head_dim))}
    parts = {"weights": weights}
    if config.has_momentum:
        parts["momentum"] = weights
    if config.inner_rule.gradient == "chunk":
        parts["anchor"] = weights
    if config.inner_window > 1:
        parts["halo"] = dict.fromkeys(("0", "1"), (config.heads, config.inner_window - 1, head_dim))
    shapes = {f"{part}.{i}": shape for part, layers in parts.items() for i, shape in layers.items()}
    if config.conv_kernel > 1:
        shapes["conv"] = (config.conv_kernel - 1, 3 * config.heads * head_dim)
    return {**shapes, "position": (), "rule": ()}


def empty_state(config: NeuralMemoryConfig, head_dim: int, like: torch.Tensor) -> Fields:
    """The state of one row that has read nothing and whose memory is zero; device and dtype of `like`."""
    fields = {
        name: like.new_zeros((1, *shape), dtype=like.dtype if shape else torch.int64)
        for name, shape in state_shapes(config, head_dim).items()
    }
    return {**fields, "rule": torch.full_like(fields["rule"], config.inner_rule.code)}


def as_chunk_state(fields: Fields, dtype: torch.dtype) -> ChunkState:
    """What `chunk_memory` takes."""

    def part(name: str) -> tuple[torch.Tensor, ...]:
        numbered = (f"{name}.{i}" for i in range(2))
        return tuple(fields[field].to(dtype) for field in numbered if field in fields)

    return ChunkState(*(part(name) for name in ChunkState._fields))


def as_fields(state: ChunkState) -> Fields:
    """The fields of a `ChunkState`. No two share memory, so that a state can be saved."""
    if state.anchor and state.anchor[0] is state.weights[0]:
        state = state._replace(anchor=tuple(weight.clone() for weight in state.weights))
    return {
        f"{part}.{i}": tensor for part, tensors in state._asdict().items() for i, tensor in enumerate(tensors)
    }


def check_fields(fields: Fields, config: NeuralMemoryConfig, head_dim: int, name: str) -> None:
    """Raise ValueError, naming memory and field, unless a memory of this config can go on from `fields`."""
    _check_rule(fields, config, name)
    shapes = state_shapes(config, head_dim)
    if set(fields) != set(shapes):
        missing, extra = sorted(set(shapes) - set(fields)), sorted(set(fields) - set(shapes))
        raise ValueError(
            f"memory {name!r}: the state lacks {missing or 'nothing'} and has {extra or 'nothing'} too much; it was "
            "written by a memory with another config (rule, depth, momentum, window or convolution)"
        )
    batch = len(fields["position"])
    for field, shape in shapes.items():
        got, whole = fields[field], not shape
        if tuple(got.shape) != (batch, *shape) or (
            got.dtype != torch.int64 if whole else got.dtype not in FLOATS
        ):
            raise ValueError(
                f"memory {name!r}: field {field!r} of the state is a {got.dtype} tensor of shape {tuple(got.shape)}, "
                f"this memory needs {'int64' if whole else 'floats'} of shape {(batch, *shape)}; it was written by "
                "a memory of another shape"
            )
    if batch and not 0 <= int(fields["position"].min()) <= int(fields["position"].max()) < config.chunk_size:
        raise ValueError(
            f"memory {name!r}: field 'position' of the state is {fields['position'].tolist()}, the chunks of this "
            f"memory have {config.chunk_size} tokens; it was written by a memory of another chunk_size"
        )


def _check_rule(fields: Fields, config: NeuralMemoryConfig, name: str) -> None:
    """A state of another rule may have the same shapes and still mean something else."""
    codes = {rule.code: known for known, rule in RULES.items()}
    for code in set(fields["rule"].flatten().tolist()) if "rule" in fields else ():
        if code != config.inner_rule.code:
            raise ValueError(
                f"memory {name!r}: field 'rule' of the state says {codes.get(code, code)!r}, this memory learns by "
                f"rule {config.rule!r}; it was written by another memory"
            )
