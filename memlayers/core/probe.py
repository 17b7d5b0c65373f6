"""`probe`: a few tokens through a model, to see that a memory just attached is read, written and decoded with."""

from __future__ import annotations

from torch import nn


def probe(model: nn.Module, name: str) -> None:
    pass
