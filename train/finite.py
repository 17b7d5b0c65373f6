"""Weights are finite, or the run stops before anything of them is saved."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from memlayers.files.tensors import is_finite

from .checkpoints import checkpoints_in
from .processes import TrainingError


class FiniteCheck:
    """Looks at the loss, at what each step has changed, and at all that is saved.

    Args:
        model: its parameters that learn are looked at.
        tables: those with row-sparse gradients, by name: of these a step is asked for the rows alone that it changed.
        checkpoints: folder of the checkpoints, for messages.
    """

    def __init__(self, model: nn.Module, tables: dict[str, nn.Parameter], checkpoints: Path):
        self.learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.tables, self.checkpoints = list(tables.values()), checkpoints
        own = {id(table) for table in self.tables}
        self.dense = [p for p in self.learning.values() if id(p) not in own]

    def check_loss(self, step: int, loss: float, norm: float) -> None:
        """Raise TrainingError, before a step is taken, where its loss or its gradient is not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}; training stopped before this step changed the "
                f"weights. {self._what_to_do()}"
            )

    @torch.no_grad()
    def check_step(self, step: int) -> None:
        """Raise TrainingError where what a step changed is not finite; call it before the gradients are dropped.

        One pass over the parameters, and one number that is waited for.
        """
        parts = [*self.dense, *(_changed(table) for table in self.tables if table.grad is not None)]
        parts = [part for part in parts if part.numel()]
        # The largest magnitude: unlike a sum of squares it does not overflow.
        if parts and not torch.isfinite(nn.utils.get_total_norm(parts, float("inf"))):
            raise self._error(step, self._first_bad([]) or "what learns")

    def check_all(self, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        """Raise TrainingError where anything that learns, or a state of its optimizer, is not finite."""
        if bad := self._first_bad(optimizers):
            raise self._error(step, bad)

    def _first_bad(self, optimizers: list[torch.optim.Optimizer]) -> str | None:
        for name, parameter in self.learning.items():
            if not is_finite(parameter.detach()):
                return name
        names = {id(parameter): name for name, parameter in self.learning.items()}
        for optimizer in optimizers:
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    if isinstance(value, torch.Tensor) and not is_finite(value):
                        return f"{key} of {names.get(id(parameter), 'a parameter')} in the optimizer"
        return None

    def _error(self, step: int, name: str) -> TrainingError:
        return TrainingError(
            f"step {step}: {name} is no longer finite; training stopped, and nothing of this step was saved. "
            f"{self._what_to_do()}"
        )

    def _what_to_do(self) -> str:
        kept = checkpoints_in(self.checkpoints)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        return f"Lower optimizer.learning_rate, set clip, or add schedule.warmup_steps; {last}."


def _changed(table: nn.Parameter) -> torch.Tensor:
    return table[table.grad._indices()[0]] if table.grad.is_sparse else table
