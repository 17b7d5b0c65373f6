"""The inner optimizer of a writer: element by element, so that rows stay apart, and differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import WriterSection

BETAS, EPS = (0.9, 0.999), 1e-8


class InnerOptimizer:
    """AdamW without decay, or plain gradients; `directions` is what a step goes along, at rate 1."""

    def __init__(self, config: WriterSection, tensors: Sequence[torch.Tensor]):
        self.config, self.n_steps = config, 0
        self.first = [torch.zeros_like(x) for x in tensors]
        self.second = [torch.zeros_like(x) for x in tensors]

    def directions(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """From gradients (batch, ...)."""
        if self.config.clip is not None:
            gradients = clipped(gradients, self.config.clip)
        if self.config.optimizer == "sgd":
            return list(gradients)
        self.n_steps += 1
        b1, b2 = BETAS
        self.first = [b1 * m + (1 - b1) * g for m, g in zip(self.first, gradients)]
        self.second = [b2 * v + (1 - b2) * g * g for v, g in zip(self.second, gradients)]
        c1, c2 = 1 - b1**self.n_steps, 1 - b2**self.n_steps
        # The root has no derivative at 0, where a tensor has no gradient yet (A, while B is zero).
        return [(m / c1) / ((v / c2 + EPS**2).sqrt() + EPS) for m, v in zip(self.first, self.second)]


def clipped(gradients: Sequence[torch.Tensor], largest: float) -> list[torch.Tensor]:
    """Gradients (batch, ...) with each row's norm, over all of them, at most `largest`."""
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    scale = (largest / (squares + EPS).sqrt()).clamp(max=1)
    return [g * scale[:, None, None] for g in gradients]
