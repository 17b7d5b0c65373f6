"""The classes that every kind of memory is one of: it keeps no state, or a state outside or inside of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import MemoryConfig
from .schedule import WHOLE_CALL, Schedule
from .state import Fields, MemoryState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DISABLED: ContextVar[frozenset[Memory]] = ContextVar("memlayers_disabled", default=frozenset())
"""Memories that a `with memlayers.disabled(...)` leaves out, in the thread that it is in."""


class Memory(nn.Module):
    """A memory that lives in a model under a name. By itself it keeps no state: what it knows are its parameters.

    Attributes:
        config: the frozen config it was built from.
    """

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config

    @property
    def enabled(self) -> bool:
        """False inside `memlayers.disabled`; the model then runs without it."""
        return self not in DISABLED.get()

    @classmethod
    def for_model(cls, config: MemoryConfig, model: nn.Module) -> Memory:
        """Build the memory that `config` describes for the width and depth of `model`.

        Raises:
            ConfigError: a field does not fit the model.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how it is built for a model")

    def install(self, model: nn.Module) -> list:
        """Put the memory's hooks into parts of `model`; each has a method `remove`, which `detach` calls. The hook of a
        whole layer is there already, see `LayerMemory`."""
        return []

    def around(self, hook, block, args: tuple, kwargs: dict):
        """What a part of the model (an attention, an MLP, a linear layer) gives out with this memory.

        Args:
            hook: a `PartHook`, which says what part; `hook.original(*args, **kwargs)` is the part without this memory.
            block: the `Block` that it is in; None where the part is called by itself.
        """
        raise NotImplementedError(f"{type(self).__name__} has no hooks in parts of a model")

    @property
    def needs_head(self) -> bool:
        """Whether it has a part in the model's head, which the decoder by itself would leave out."""
        return False

    # what training asks of a kind

    def tables(self) -> dict[str, nn.Parameter]:
        """Large tables of which a token reads a few rows, by their names here: they may have an optimizer of their own."""
        return {}

    def sparse_gradients(self, on: bool = True) -> None:
        """Make the gradients of `tables` row-sparse (`torch.sparse_coo`), or dense again."""

    def check_tables_can_learn(self) -> str | None:
        """Why `tables` alone cannot learn, or None."""
        return None

    def frozen_parameters(self) -> set[str]:
        """Names here of the parameters that the config says are not to learn."""
        return set()

    def extra_loss(
        self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor | None:
        """A loss of its own for a text (batch, tokens), mask bool, False at padding; None: it has none."""
        return None

    def check_extra_loss(self, weight: float) -> str | None:
        """What is wrong with this weight of `extra_loss`, or None."""
        return None

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    def readers(self) -> dict[str, tuple[nn.Module, str]]:
        """What reads `tables`, by name: a module with a list `observers`, to be called with the indices and weights of each
        read, and `new_counter()`, which counts them; and the name of the table."""
        return {}

    def start_from_texts_(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put parameters to where texts of the config say that they start; before the first step."""

    def add_to_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give a tokenizer, in place, the new tokens of this memory."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.model_dump().items() if k != "type")


class StatefulMemory(Memory):
    """A memory with a part in a `MemoryState`: what it has read of a text.

    Attributes:
        schedule: how a text is cut for it, and what attention reaches.
        write_layer: decoder layer whose output `update` is given; None: it takes none.
    """

    schedule: Schedule = WHOLE_CALL
    write_layer: int | None = None
    n_extra_tokens: int = 0
    """Tokens that it adds to a block."""
    grows: frozenset[str] = frozenset()
    """Fields whose second dimension is not the same in every state."""

    @property
    def state_kind(self) -> str:
        """Which kind of memory its states are of."""
        return self.config.type

    @property
    def gradient_writer(self) -> nn.Module | None:
        """What writes its state by gradient steps, which only `memlayers.write` takes; None: forward calls write."""
        return None

    def new_state(self, batch_size: int) -> Fields:
        """What the memory holds before it has read anything, for `batch_size` rows."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its state is")

    def read_inputs(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Tokens to put before a block, (batch, n, hidden_size), and which are in use, (batch, n); None: it has none."""
        return None

    def write_inputs(self, fields: Fields) -> torch.Tensor | None:
        """Tokens (batch, n, hidden_size) to put behind a block for writing; None: it has none."""
        return None

    def update(
        self, fields: Fields, written: torch.Tensor | None, segment: torch.Tensor, mask: torch.Tensor
    ) -> Fields:
        """Its fields after a block was read; rows without a token keep theirs.

        Args:
            written: what `write_layer` gave out, (batch, n, hidden_size), at the write tokens, or at the last token of
                the block where it has none.
            segment: embeddings of the block, (batch, tokens, hidden_size).
            mask: (batch, tokens) bool, False at padding.
        """
        return fields

    def state_to_try(self, model: nn.Module, input_ids: torch.Tensor) -> Fields:
        """Fields that `probe` reads before anything was written by gradient, for a text (batch, tokens)."""
        return self.new_state(len(input_ids))

    def positions(self, fields: Fields) -> torch.Tensor | None:
        """(batch,) int64: positions before a text that a memory takes for itself; None: none."""
        return None

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
        """Its fields after its `gradient_writer` has written a text (batch, tokens) into `state`, which stays as it is.

        Args:
            mask: (batch, tokens) bool, False at padding.
            differentiable: keep the graph from the state and this memory's parameters to the result.
        """
        raise NotImplementedError(f"{type(self).__name__} is written by forward calls")

    def check_state(self, fields: Fields, name: str) -> None:
        """Raise ValueError when `fields` cannot be a state of this memory by its names, shapes and dtypes; names the memory
        and the field. It reads no number, so that it may be called before each token."""
        expected = self.new_state(1)
        if set(fields) != set(expected):
            raise ValueError(
                f"memory {name!r}: the state has fields {sorted(fields)}, this memory needs {sorted(expected)}; "
                "it was written by another memory"
            )
        for field, tensor in expected.items():
            shape = ["batch", *tensor.shape[1:]]
            if field in self.grows:
                shape[1] = None
            check_field(name, field, fields[field], shape, tensor.dtype)

    def check_numbers(self, fields: Fields, name: str) -> None:
        """Raise ValueError for numbers that no memory writes, such as a length of more than there is; names the memory, the
        field and the number. For a state from outside, whose shapes `check_state` has passed."""


class LayerMemory(StatefulMemory):
    """A memory inside the decoder's layers, which finds its state in the `Block` of the pass that it is in.

    Attributes:
        at_layers: numbers of the layers around which it is called.
    """

    at_layers: Iterable[int] = ()

    def before_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input that the layer shall have, (batch, tokens, hidden_size). It runs once, outside of what gradient
        checkpointing runs twice."""
        return hidden

    def after_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> None:
        """Called with what the layer gave out, (batch, tokens, hidden_size); may write."""


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_field(
    name: str, field: str, got: torch.Tensor, shape: Sequence[int | str | None], dtype: torch.dtype
) -> None:
    """Raise ValueError unless a field of a state has this shape, and numbers like those of `dtype`.

    Args:
        shape: (batch, ...); None and names stand for any number.
        dtype: of floats all are taken, of others this one.
    """
    fits = got.dim() == len(shape) and all(
        not isinstance(size, int) or size == found for size, found in zip(shape, got.shape, strict=True)
    )
    if not fits or (got.dtype not in FLOATS if dtype.is_floating_point else got.dtype != dtype):
        sizes = got.shape if got.dim() == len(shape) else ["any"] * len(shape)
        wanted = ", ".join(
            str(s if isinstance(s, int) else any_) for s, any_ in zip(shape, sizes, strict=True)
        )
        raise ValueError(
            f"memory {name!r}: field {field!r} of the state has shape {tuple(got.shape)} and numbers of {got.dtype}, this "
            f"memory needs ({wanted}) of {'floats' if dtype.is_floating_point else dtype}; it was written by another memory"
        )


def check_range(name: str, field: str, got: torch.Tensor, most: int) -> None:
    """Raise ValueError for whole numbers of a field of a state outside of 0 to `most`."""
    outside = got[(got < 0) | (got > most)]
    if outside.numel():
        raise ValueError(
            f"memory {name!r}: field {field!r} of the state says {outside[0].item()}, which can be 0 to {most}; the state is "
            "damaged or was not written by a memory"
        )


def fresh_state(
    memories: Mapping[str, StatefulMemory], batch_size: int, pending: Mapping[str, Fields] | None = None
) -> MemoryState:
    """The state before anything was read; `pending` is what else it holds."""
    parts = {name: memory.new_state(batch_size) for name, memory in memories.items()}
    kinds = {n: m.state_kind for n, m in memories.items()}
    parts.update(pending or {})
    return MemoryState(parts, kinds, trusted=frozenset(parts))


def append_rows(old: torch.Tensor, new: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """(batch, n + m, ...): `new` (batch, m, ...) behind `old` (batch, n, ...) in the rows that are `active` (batch,)
    bool; in the others `old` moves to the right, behind m zeros."""
    grown = torch.cat([old, new], dim=1)
    kept = torch.cat([torch.zeros_like(new), old], dim=1)
    return torch.where(active.view(-1, *[1] * (old.dim() - 1)), grown, kept)
