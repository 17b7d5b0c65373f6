"""`LoRAAdapter`: what is added to one linear layer, with adapters of its own for each row."""

from __future__ import annotations

import math

import torch
from torch import nn


class LoRAAdapter(nn.Module):
    """y = x Aᵀ Bᵀ · lora_alpha / r (2106.09685, section 4.1), A and B from the state of each row.

    Attributes:
        A: (r, in_features), where every row's A starts. (PEFT takes parameters called lora_A for its own.)
        B: (out_features, r), where every row's B starts: at zero, which leaves the model as it was.
    """

    def __init__(self, in_features: int, out_features: int, r: int, lora_alpha: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling = lora_alpha / r
        draw_a(self.A)

    def new_state(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (batch, r, in_features) and B (batch, out_features, r) before anything is written, in float32."""
        precise = torch.promote_types(self.A.dtype, torch.float32)
        return tuple(x.to(precise).expand(batch_size, -1, -1) for x in (self.A, self.B))

    def forward(
        self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the adapters add, or `onto` with that added.

        Args:
            x: (rows, tokens, in_features), or with what is before the last dimension in other shapes of the same order, as
                flattened; rows = n · batch where n rows in a row share an adapter.
            a: (batch, r, in_features).
            b: (batch, out_features, r). Ranks may differ from the config's: adapters that are mixed stand side by side.
            onto: (..., out_features), what the linear layer gave out for x; not changed.

        Returns:
            (..., out_features) in x's dtype.

        Raises:
            ValueError: rows that are no multiple of batch.
        """
        if x.dim() < 2 or x.shape[0] % a.shape[0]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the adapters of {a.shape[0]} rows take (rows, tokens, {a.shape[2]})"
            )
        inner = torch.bmm(x.to(a.dtype).reshape(a.shape[0], -1, x.shape[-1]), a.mT)
        if onto is None:
            return torch.bmm(inner * self.scaling, b.mT).view(*x.shape[:-1], -1).to(x.dtype)
        rows = onto.to(a.dtype).reshape(a.shape[0], -1, onto.shape[-1])
        return torch.baddbmm(rows, inner, b.mT, alpha=self.scaling).view(onto.shape).to(onto.dtype)

    def extra_repr(self) -> str:
        r, in_features = self.A.shape
        return f"in_features={in_features}, out_features={self.B.shape[0]}, r={r}, scaling={self.scaling:g}"


def draw_a(a: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Fill A in place as PEFT draws it."""
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
