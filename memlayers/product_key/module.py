"""Product-key memory as an `nn.Module` that stands alone: a tensor in, a tensor of the same shape out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from memlayers.kernels.product_key_topk import product_key_topk
from memlayers.kernels.weighted_gather import weighted_gather

from ..config import ConfigError
from ..core.linear import Linear
from ..core.size import check_fits
from .config import ProductKeyMemoryConfig
from .usage import SlotUsage

Observer = Callable[[torch.Tensor, torch.Tensor], None]


class ProductKeyMemory(nn.Module):
    """Every token reads `top_k` slots per head of a table of `n_keys`² values.

    With q the query, K₁ and K₂ the keys of the halves and V the values (2412.09764, equations 1 to 5):

        s(i₁, i₂) = q₁·K₁[i₁] + q₂·K₂[i₂],   I = top-k of s,   y = Σ over I and heads of weight(s) V[i₁ n_keys + i₂]
        output = value_proj(y ⊙ gate(x))

    Each token is on its own: nothing reaches from one position or row to another.

    Args:
        config: fields, see `ProductKeyMemoryConfig`; `layers`, `placement` and `share_values` say nothing here.
        hidden_size: width of the input and the output.
        own_values: False where the table comes with every call, from a pool that several memories share.

    Attributes:
        keys: (heads, 2, n_keys, key_dim / 2) parameter.
        values: (n_keys², value_dim) parameter, None without `own_values`.
        sparse: the gradient of the table is a `torch.sparse_coo` tensor of the rows that were read, as in
            `nn.Embedding`; for optimizers that take such gradients.
        kernels: which path computes, see `memlayers.kernels.paths`; None: the best for the device.
        observers: called with the slots read (..., heads · top_k) int64 and their weights, in each forward.

    Raises:
        ConfigError: without `value_proj`, a `value_dim` that is not `hidden_size`.
        ValueError: an input that holds NaN, or a table of another shape.
    """

    def __init__(self, config: ProductKeyMemoryConfig, hidden_size: int, own_values: bool = True):
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.value_dim = value_width(config, hidden_size)
        self.n_slots = config.n_keys**2
        half = config.key_dim // 2
        self.query = Linear(hidden_size, config.heads * config.key_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(config.heads, 2, config.n_keys, half))
        if config.qk_norm:
            self.query_norm = nn.Parameter(torch.empty(config.heads, 2, half))
            self.key_norm = nn.Parameter(torch.empty(config.heads, 2, half))
        self.values = new_values(config, hidden_size) if own_values else None
        if config.gate != "none":
            self.gate = Linear(
                hidden_size, self.value_dim if config.gate == "silu" else 1, bias=config.gate == "learned"
            )
        if config.value_proj:
            self.value_proj = Linear(self.value_dim, hidden_size, bias=False)
        self.sparse, self.kernels = False, None
        self.observers: list[Observer] = []
        self.reset_parameters()

    def new_counter(self) -> SlotUsage:
        """What counts this memory's reads, see `observers`."""
        return SlotUsage(self.config.heads, self.config.n_keys, self.keys.device)

    def reset_parameters(self) -> None:
        """Initial values of everything but the table, see `new_values`."""
        config = self.config
        size = (config.key_dim // 2) ** -0.5
        if config.key_init == "uniform":
            nn.init.uniform_(self.keys, -size, size)
        else:
            nn.init.normal_(self.keys, std=size)
        nn.init.normal_(self.query.weight, std=self.hidden_size**-0.5)
        if config.qk_norm:  # the score of a random query and key then has a spread of 1
            for scale in (self.query_norm, self.key_norm):
                nn.init.constant_(scale, (config.key_dim // 2) ** -0.25)
        if config.gate != "none":
            nn.init.normal_(self.gate.weight, std=self.hidden_size**-0.5 if config.gate == "silu" else 0.02)
        if config.gate == "learned":
            nn.init.constant_(self.gate.bias, config.gate_bias)
        if config.value_proj:
            starts_the_model = config.placement == "replace"
            nn.init.normal_(self.value_proj.weight, std=self.value_dim**-0.5 if starts_the_model else 0.0)

    def forward(self, x: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., hidden_size) → (..., hidden_size), dtype of x.

        Args:
            values: (n_keys², value_dim), the shared table of a memory that has none of its own.
        """
        values = self._table(values)
        inner = x.to(self.keys.dtype)
        indices, weights = self.lookup(inner)
        for observe in self.observers:
            observe(indices, weights.detach())
        read = weighted_gather(values, indices, weights, sparse=self.sparse, path=self.kernels).to(
            inner.dtype
        )
        if self.config.gate == "silu":
            read = read * F.silu(self.gate(inner))
        elif self.config.gate == "learned":
            read = read * torch.sigmoid(self.gate(inner))
        return (self.value_proj(read) if self.config.value_proj else read).to(x.dtype)

    def lookup(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots that each token reads.

        Returns:
            indices (..., heads · top_k) int64 and weights of the same shape; the heads stand one after another.
        """
        config = self.config
        query = self.query(x).unflatten(-1, (config.heads, 2, config.key_dim // 2))
        keys = self.keys
        if config.qk_norm:
            query, keys = _norm(query, self.query_norm), _norm(keys, self.key_norm[:, :, None])
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("...hpd,hpnd->p...hn", query.to(keys.dtype), keys)
            best, indices = product_key_topk(scores[0], scores[1], config.top_k, path=self.kernels)
            weights = self._weights(best)
        return indices.flatten(-2), weights.flatten(-2)

    def _weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Weights of the slots that were chosen, in float32 or better."""
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.config.score == "softmax":
            weights = scores.softmax(-1)
        else:
            weights = torch.sigmoid(scores) if self.config.score == "sigmoid" else F.relu(scores)
        return F.dropout(weights, self.config.dropout, self.training)

    def _table(self, values: torch.Tensor | None) -> torch.Tensor:
        values = self.values if values is None else values
        if values is None:
            raise ValueError("this memory has no values of its own (own_values=False); pass values=")
        if values.shape != (self.n_slots, self.value_dim):
            raise ValueError(
                f"values have shape {tuple(values.shape)}, this memory reads {self.n_slots} slots of "
                f"{self.value_dim}; a pool can be shared only by memories of one n_keys and value_dim"
            )
        return values

    def extra_repr(self) -> str:
        return f"{self.n_slots:,} slots of {self.value_dim}, {self.config.heads} heads, top_k={self.config.top_k}"


def _norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, with a learned scale."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * scale


def value_width(config: ProductKeyMemoryConfig, hidden_size: int) -> int:
    """Width of a slot.

    Raises:
        ConfigError: without `value_proj` the slots must be as wide as the model.
    """
    width = config.value_dim or hidden_size
    if not config.value_proj and width != hidden_size:
        raise ConfigError(
            f"value_dim: without value_proj a slot must be as wide as the model, {hidden_size}, not {width}"
        )
    return width


def new_values(config: ProductKeyMemoryConfig, hidden_size: int) -> nn.Parameter:
    """A table of (n_keys², value_dim) values, float32.

    Raises:
        ConfigError: it would not fit into memory; says its bytes, and nothing was allocated.
    """
    width = value_width(config, hidden_size)
    check_fits(
        4 * config.n_keys**2 * width,
        f"n_keys: lower it or value_dim: a table of {config.n_keys}² = {config.n_keys**2:,} slots of {width}",
    )
    values = nn.Parameter(torch.empty(config.n_keys**2, width))
    if config.value_init == "zero":
        nn.init.zeros_(values)
    else:
        nn.init.normal_(values, std=width**-0.5)
    return values
