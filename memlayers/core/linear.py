"""`Linear`, the linear map inside a memory, and the names of modules that PEFT does not take for its targets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x weightᵀ + bias. What `nn.Linear` is, with the same names and the same first values, but none of its class, so
    that whatever goes through a model and changes its linear layers (`target_modules="all-linear"` of PEFT, quantizers)
    leaves a memory as it is.

    Attributes:
        weight: (out_features, in_features).
        bias: (out_features,), or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values, drawn as `nn.Linear` draws them."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) → (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        # What an error of PEFT says where a regular expression in target_modules names this layer.
        shape = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return shape + r', of a memory; exclude_modules=r".*memlayers\..*"'


class UnmatchedName(str):
    """The name of a module that no end matches. PEFT chooses its targets (`target_modules`, `modules_to_save`,
    `trainable_token_indices`) by the ends of names: those that stand for a layer of the base, `out_proj` or `norm`, shall
    not find one of the same name in a memory. A whole name and a regular expression still find it."""

    __slots__ = ()

    def endswith(self, *_) -> bool:
        """False, whatever the end."""
        return False
