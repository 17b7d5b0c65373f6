"""The inner optimizer of a writer: element by element, so that rows stay apart, and differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import WriterSection

BETAS, EPS = (0.9, 0.999), 1e-8


class InnerOptimizer:
    """AdamW without decay, or plain gradients."""

    def __init__(self, config: WriterSection, tensors: Sequence[torch.Tensor]):
        self.config, self.n_steps = config, 0
        if config.optimizer == "adamw":
            self.first = [torch.zeros_like(x) for x in tensors]
            self.second = [torch.zeros_like(x) for x in tensors]

    def step(
        self,
        tensors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        rates: Sequence[float | torch.Tensor],
    ) -> list[torch.Tensor]:
        """`tensors` (batch, ...) after a step along their gradients, each at its own rate."""
        if self.config.clip is not None:
            gradients = clipped(gradients, self.config.clip)
        if self.config.optimizer == "sgd":
            return [x - rate * g for x, g, rate in zip(tensors, gradients, rates)]
        self.n_steps += 1
        b1, b2 = BETAS
        self.first = [m.lerp(g, 1 - b1) for m, g in zip(self.first, gradients)]
        self.second = [(b2 * v).addcmul(g, g, value=1 - b2) for v, g in zip(self.second, gradients)]
        # x − rate · (m / c1) / (√(v / c2) + EPS), with the corrections c1 and c2 taken out of the fraction. Under the
        # root, EPS²: it has no derivative at 0, where a tensor has no gradient yet (A, while B is zero).
        c1, c2 = 1 - b1**self.n_steps, 1 - b2**self.n_steps
        root = c2**0.5
        return [
            x - (rate * (root / c1)) * (m / ((v + EPS**2 * c2).sqrt() + EPS * root))
            for x, m, v, rate in zip(tensors, self.first, self.second, rates)
        ]


def clipped(gradients: Sequence[torch.Tensor], largest: float) -> list[torch.Tensor]:
    """Gradients (batch, ...) with each row's norm, over all of them, at most `largest`."""
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    scale = (largest / (squares + EPS).sqrt()).clamp(max=1)
    return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
