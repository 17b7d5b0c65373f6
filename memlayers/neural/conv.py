"""Causal depthwise convolution that goes on where the last call ended."""

from __future__ import annotations

import torch
from torch import nn

from .packing import Packing


class CausalConv(nn.Module):
    """y_t = Σ_i weight[i] ⊙ x_{t − kernel + 1 + i}: each channel on its own, the present token and those before it.

    Args:
        channels: width.
        kernel: tokens that a token sees, itself included, at least 2.

    Attributes:
        weight: (kernel, channels) parameter, the last row for the present token.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv1d` starts."""
        bound = len(self.weight) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: torch.Tensor, tail: torch.Tensor, packing: Packing | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, channels) → y of the same shape and dtype, and the tail for the next call.

        Args:
            tail: (B, kernel - 1, channels), the last inputs of earlier calls; zeros before the first.
            packing: where rows start and end when they do not fill all of x; y is then of use only between.
        """
        kernel, length = len(self.weight), x.shape[1]
        weight = self.weight.to(x.dtype)
        if packing is None:
            inputs = torch.cat([tail.to(x.dtype), x], dim=1)
            new_tail = inputs[:, length:]
        else:
            inputs = torch.cat([torch.zeros_like(tail, dtype=x.dtype), x], dim=1)
            inputs = inputs.scatter(1, _columns(packing.start, tail), tail.to(x.dtype))
            new_tail = inputs.gather(1, _columns(packing.end, tail))
        y = inputs[:, :length] * weight[0]
        for i in range(1, kernel):
            y = torch.addcmul(y, inputs[:, i : i + length], weight[i])
        return y, new_tail.to(tail.dtype)

    def extra_repr(self) -> str:
        return "kernel={}, channels={}".format(*self.weight.shape)


def _columns(start: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As many columns of each row as `like` (B, n, channels) has, from `start` (B,) on; as index for dimension 1."""
    columns = start[:, None] + torch.arange(like.shape[1], device=like.device)
    return columns[..., None].expand(like.shape)
