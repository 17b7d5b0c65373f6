"""`TaskRows`: trained vocabulary rows as an `nn.Module` that stands alone, and `BaseRows`, which they start like."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

NOISE = 0.1
"""Size of the noise on a new row, as a share of a row of the base."""


class TaskRows(nn.Module):
    """Vocabulary rows behind those of a base, each a parameter of its own; a place may be free.

    Args:
        tied: the row that is read also predicts.

    Attributes:
        input: place, as a string, to the row (embedding width) that is read.
        output: place to the row (head width) that predicts; None where `tied`.
        n_places: rows and free places.
    """

    def __init__(self, tied: bool):
        super().__init__()
        self.input = nn.ParameterDict()
        self.output = None if tied else nn.ParameterDict()
        self.n_places = 0

    @property
    def free(self) -> list[int]:
        """The free places, in order."""
        return [place for place in range(self.n_places) if str(place) not in self.input]

    def sides(self) -> dict[str, nn.ParameterDict]:
        """`input` and, where it has rows of its own, `output`."""
        return {"input": self.input} if self.output is None else {"input": self.input, "output": self.output}

    def put(self, place: int, rows: dict[str, nn.Parameter]) -> None:
        """Set the row of each side at `place`; places up to it that have none are free."""
        for side, present in self.sides().items():
            present = {**present, str(place): rows[side]}
            # A plain dict would be sorted as strings: "10" before "2".
            in_order = OrderedDict((key, present[key]) for key in sorted(present, key=int))
            setattr(self, side, nn.ParameterDict(in_order))
        self.n_places = max(self.n_places, place + 1)

    def drop(self, place: int) -> dict[str, nn.Parameter]:
        """Free a place; what stood there."""
        return {side: present.pop(str(place)) for side, present in self.sides().items()}

    def read(self, places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows (..., embedding width) of `places` (...) int64, in the dtype and on the device of `like`.

        A free place reads zeros; one past the last is an IndexError."""
        if not self.input:
            return like.new_zeros(*places.shape, like.shape[-1])
        return F.embedding(places, self._spread(_stacked(self.input, like), 0, fill=0.0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., n_places) for hidden (..., head width), in its dtype; -inf at free places."""
        rows = self.input if self.output is None else self.output
        if not rows:
            return hidden.new_full((*hidden.shape[:-1], self.n_places), -torch.inf)
        return self._spread(F.linear(hidden, _stacked(rows, hidden)), -1, fill=-torch.inf)

    def _spread(self, values: torch.Tensor, dim: int, fill: float) -> torch.Tensor:
        """Put what belongs to the rows, along `dim`, to their places, and `fill` to the free ones."""
        if values.shape[dim] == self.n_places:
            return values
        shape = list(values.shape)
        shape[dim] = self.n_places
        places = torch.tensor([int(place) for place in self.input], device=values.device)
        return values.new_full(shape, fill).index_copy(dim, places, values)

    def extra_repr(self) -> str:
        return f"n_places={self.n_places}"


def _stacked(rows: nn.ParameterDict, like: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(rows.values())).to(like)


class BaseRows:
    """The vocabulary rows of a base on one side: its input embedding, or its head.

    No module, so that a memory that refers to it does not hold the base's tensors as its own.

    Attributes:
        module: the embedding or the head.
        norm: mean length of the rows.
        mean: the mean row (width,), float32, on the CPU.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        with torch.no_grad():
            self.norm = module.weight.norm(dim=1, dtype=torch.float32).mean().item()
            self.mean = module.weight.mean(dim=0, dtype=torch.float32).cpu()

    @torch.no_grad()
    def new(self, ids: list[int] | None = None) -> nn.Parameter:
        """A new row (width,), float32: the mean of the base's rows and a little noise, or the mean of those of
        `ids`; as long as the base's rows are in the mean."""
        row = self.mean + torch.randn_like(self.mean) * (NOISE * self.norm * len(self.mean) ** -0.5)
        if ids is not None:
            row = self.module.weight[ids].float().mean(0)
        return nn.Parameter(self.as_long(row).to(self.module.weight.device))

    def as_long(self, row: torch.Tensor) -> torch.Tensor:
        """`row` at the mean length of the base's rows."""
        return row * (self.norm / row.norm().clamp(min=torch.finfo(row.dtype).tiny))
