"""`AssociativeLayer`: the matrix of one layer, written by the delta rule and read by association."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..core.linear import Linear
from .config import AssociativeMemoryConfig

EPS = 1e-5


class AssociativeLayer(nn.Module):
    """One layer's part of an associative memory (ARMT, 2407.04841, section 3). Stands alone: tensors in, tensors out.

    φ are DPFP-ν features of length 1, A the matrix, z the sum of the keys' features:

        read(x)  = Aᵀφ(q) / (z · φ(q)), or Aᵀφ(q) where the config says `normalize: false`
        write(m) : A ← A + Σ σ(β) φ(k) (v − read at k)ᵀ,   z ← z + Σ γ φ(k),   γ = 1 − z · φ(k), within 0 and 1

    with q, k, v and β linear in the RMS-normed input. γ keeps z from counting a key twice (`correction`; else 1). All
    tokens that write see the same A and z. `value` starts at zero, so that nothing is read until it has learned; `query` and
    `key` start as one map, so that what resembles a key finds it before they have learned anything.

    Args:
        config: fields, see `AssociativeMemoryConfig`.
        hidden_size: width of the model.
    """

    def __init__(self, config: AssociativeMemoryConfig, hidden_size: int):
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query = Linear(hidden_size, config.key_dim, bias=False)
        self.key = Linear(hidden_size, config.key_dim, bias=False)
        self.value = Linear(hidden_size, hidden_size, bias=False)
        self.beta = Linear(hidden_size, 1)
        self.key.weight.data.copy_(self.query.weight)
        nn.init.zeros_(self.value.weight)

    def new_state(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (batch, n_features, hidden_size) and z (batch, n_features), float32 zeros."""
        n_features = self.config.n_features
        like = {"dtype": torch.float32, "device": self.value.weight.device}
        return torch.zeros(batch_size, n_features, self.hidden_size, **like), torch.zeros(
            batch_size, n_features, **like
        )

    def read(self, x: torch.Tensor, matrix: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """What the memory holds for x (batch, tokens, hidden_size): the same shape, in the state's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return self._associated(self._features(self.query, self._normed(x, matrix)), matrix, normalizer)

    def write(
        self, tokens: torch.Tensor, matrix: torch.Tensor, normalizer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and z after `tokens` (batch, n_tokens, hidden_size) have written; the old ones are left as they are."""
        with torch.autocast(tokens.device.type, enabled=False):
            m = self._normed(tokens, matrix)
            keys = self._features(self.key, m)
            new = self._linear(self.value, m) - self._associated(keys, matrix, normalizer)
            strength = self._linear(self.beta, m).sigmoid()
            weight = torch.ones_like(strength[..., 0])
            if self.config.correction:
                weight = (1 - (keys @ normalizer[..., None])[..., 0]).clamp(0, 1)
            return matrix + keys.mT @ (strength * new), normalizer + (weight[..., None] * keys).sum(1)

    def _associated(
        self, features: torch.Tensor, matrix: torch.Tensor, normalizer: torch.Tensor
    ) -> torch.Tensor:
        """(batch, tokens, hidden_size) for features (batch, tokens, n_features); 0 where nothing like them was written."""
        held = features @ matrix
        return held / (features @ normalizer[..., None] + EPS) if self.config.normalize else held

    def _normed(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(state.dtype), (self.hidden_size,), self.norm.weight.to(state.dtype), 1e-6)

    def _features(self, projection: Linear, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(dpfp(self._linear(projection, x), self.config.nu), dim=-1)

    def _linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """In x's dtype, whatever that of the weights: the state accumulates."""
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)


def dpfp(x: torch.Tensor, nu: int) -> torch.Tensor:
    """DPFP-ν features (2102.11174): products of r = relu([x, −x]) with itself, rolled by 1 to ν places.

    Args:
        x: (..., d).

    Returns:
        (..., 2 · nu · d), none below zero.
    """
    r = torch.cat([x, -x], dim=-1).relu()
    return torch.cat([r * r.roll(places, dims=-1) for places in range(1, nu + 1)], dim=-1)
