"""Reptile (Nichol et al., 1803.02999): an outer gradient from where the inner steps went."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def reptile(written: torch.Tensor, start: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """`written` as it is; backward, `start` gets (start − written) / (learning_rate · batch).

    What comes after passes through `written`, so that with plain gradients and the answer's loss L, a mean over rows,
    start − learning_rate · (its whole gradient) is where one more step on the answer would have led, in the mean of the
    rows: Reptile with the answer as its last inner step. The way does not scale with L.

    Args:
        written, start: (batch, ...), after and before the inner steps.
    """
    return _Reptile.apply(written, start, learning_rate)


class _Reptile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, written, start, learning_rate):
        ctx.way = (start - written) / (learning_rate * len(start))
        return written.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, ctx.way, None
