"""Slot usage of memories with tables while they train: in every line of the log, and as a picture at the end."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from memlayers.core.usage import draw_usage, track_usage


class UsageLog:
    """Counts every read of a table from its making to `close`; without tables it counts nothing.

    Args:
        model: its memories with tables are watched.
    """

    def __init__(self, model: nn.Module):
        self._stack = ExitStack()
        self.counters = self._stack.enter_context(track_usage(model))
        self._logged = {}

    def figures(self) -> dict[str, float]:
        """What the counters' `summary` says of all processes' reads since the last call, as `usage/layer/figure`.

        Every process must call it; counting starts anew.
        """
        figures = {}
        for name, counter in self.counters.items():
            counter.merge()
            figures.update({f"usage/{name}/{key}": value for key, value in counter.summary().items()})
        self._logged = copy.deepcopy(self.counters)
        for counter in self.counters.values():
            counter.clear()
        return figures

    def tensors(self) -> dict[str, torch.Tensor]:
        """This process's counts since the last line, for a checkpoint."""
        return {f"{key}/{name}": t for name, c in self.counters.items() for key, t in c.tensors().items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def draw(self, path: Path) -> None:
        """A picture of the reads behind the last line of the log, if there are any."""
        if self._logged:
            draw_usage(self._logged, path)

    def close(self) -> None:
        """Stop counting."""
        self._stack.close()
