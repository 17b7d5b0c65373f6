"""The base class of every kind of memory, and what a kind says about itself."""

from __future__ import annotations

import torch
from torch import nn

from .config import MemoryConfig

Fields = dict[str, torch.Tensor]
"""One memory's part of a `MemoryState`: batch-first tensors by name."""


class Memory(nn.Module):
    """A memory that lives in a model under a name.

    A kind overrides what it needs: `new_state` when it remembers during inference, and either the segment
    protocol (`segment_length` and what `memlayers.segments` calls) or hooks of its own in `install`, which find
    their state in the `memlayers.passes.Pass` of the call.

    Attributes:
        config: the frozen config it was built from.
        enabled: False inside `memlayers.disabled`; the model then runs without it.
    """

    segment_length: int | None = None
    """Tokens per segment for kinds that read a long input in segments, None for the others."""
    in_layers: bool = False
    """Whether it sits inside the layers and finds its state in the `memlayers.passes.Pass` of a call."""
    sliding_window: int | None = None
    """Tokens that attention reaches in a model with such a memory; None: as many as in the base."""
    n_extra_tokens: int = 0
    """Tokens that such a kind adds to a segment."""
    write_layer: int = -1
    """Decoder layer whose output such a kind writes from."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        self.enabled = True

    @property
    def streams(self) -> bool:
        """Whether every token changes the state as it passes (`memlayers.streaming`), without segments."""
        return self.in_layers and self.segment_length is None

    @classmethod
    def for_model(cls, config: MemoryConfig, model: nn.Module) -> Memory:
        """Build the memory that `config` describes for the width and depth of `model`.

        Raises:
            ConfigError: a field does not fit the model.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how it is built for a model")

    def install(self, model: nn.Module) -> list:
        """Put the memory's hooks into `model`; the handles returned are removed by `detach`."""
        return []

    def new_state(self, batch_size: int) -> Fields:
        """What the memory holds before it has read anything, for `batch_size` rows; {} if it has no state."""
        return {}

    def check_state(self, fields: Fields, name: str) -> None:
        """Raise ValueError when `fields` cannot be a state of this memory; names the memory and the field."""
        expected = self.new_state(1)
        if set(fields) != set(expected):
            raise ValueError(
                f"memory {name!r}: the state has fields {sorted(fields)}, this memory needs {sorted(expected)}; "
                "it was written by another memory"
            )
        for field, tensor in expected.items():
            got = fields[field]
            if got.dim() != tensor.dim() or (tensor.dim() > 1 and got.shape[-1] != tensor.shape[-1]):
                raise ValueError(
                    f"memory {name!r}: field {field!r} of the state has shape {tuple(got.shape)}, "
                    f"this memory needs (batch, ...) like {tuple(tensor.shape)}; it was written by another memory"
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.model_dump().items() if k != "type")
