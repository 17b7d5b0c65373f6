"""The base class of every kind of memory, and what a kind says about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .config import MemoryConfig

if TYPE_CHECKING:
    from .state import MemoryState

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
    by_gradient: bool = False
    """Whether its state is written by gradient steps, which only `memlayers.write` takes; forward calls read it."""
    sliding_window: int | None = None
    """Tokens that attention reaches in a model with such a memory; None: as many as in the base."""
    n_extra_tokens: int = 0
    """Tokens that such a kind adds to a segment."""
    signature: str = ""
    """Last part of the name of a field by which a state of this kind is known among those of other kinds."""
    write_layer: int = -1
    """Decoder layer whose output such a kind writes from."""
    from_text: bool = False
    """Whether such a kind writes from the embeddings of a segment instead, and takes their mask."""
    reads_back: bool = False
    """Whether the text can be read back from its state (`cycle_loss`, `read_back`)."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        self.enabled = True

    @property
    def streams(self) -> bool:
        """Whether it reads every token as it passes, without segments (`memlayers.streaming`), and changes its state
        with it unless that is written `by_gradient`."""
        return self.in_layers and self.segment_length is None

    @property
    def keeps_state(self) -> bool:
        """Whether it has a part in a `MemoryState`."""
        return self.streams or self.segment_length is not None

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

    def write(
        self,
        model: nn.Module,
        name: str,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        state: MemoryState,
        *,
        differentiable: bool,
        progress: bool,
    ) -> Fields:
        """This memory's fields after a text (batch, tokens) is written into `state` `by_gradient`, `state` unchanged.

        Args:
            mask: (batch, tokens) bool, False at padding.
            differentiable: keep the graph from the state and this memory's parameters to the result.
        """
        raise NotImplementedError(f"{type(self).__name__} is written by forward calls")

    def cycle_loss(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean loss of a text (batch, tokens) when it is written and read back, for memories that `reads_back`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be read back")

    def positions(self, fields: Fields) -> torch.Tensor | None:
        """(batch,) int64: positions before a text that a memory takes for itself; None: none."""
        return None

    def write_inputs(self, state: Fields) -> torch.Tensor | None:
        """Tokens (batch, n, hidden_size) to put behind a segment for writing; None where it takes none."""
        return None

    @classmethod
    def wrote(cls, fields: Fields) -> str | None:
        """How to call the memory of this kind that wrote `fields`; None: it is of another kind."""
        known = any(field.rpartition(".")[2] == cls.signature for field in fields)
        return cls.__name__ if known else None

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


def append_rows(old: torch.Tensor, new: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """(batch, n + m, ...): `new` (batch, m, ...) behind `old` (batch, n, ...) in the rows that are `active` (batch,)
    bool; in the others `old` moves to the right, behind m zeros."""
    grown = torch.cat([old, new], dim=1)
    kept = torch.cat([torch.zeros_like(new), old], dim=1)
    return torch.where(active.view(-1, *[1] * (old.dim() - 1)), grown, kept)


@torch.no_grad()
def embedding_std(model: nn.Module) -> float:
    """Standard deviation of a model's input embeddings: the size at which tokens of a memory enter it."""
    embeddings = model.get_input_embeddings()
    some = torch.arange(min(embeddings.num_embeddings, 1000), device=embeddings.weight.device)
    return embeddings(some).float().std().item()
