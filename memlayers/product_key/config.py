"""The fields of a product-key memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config import ConfigError, MemoryConfig
from ..limits import Bias, Layer, Part, Width


class ProductKeyMemoryConfig(MemoryConfig):
    """A table of `n_keys`² values in some layers, of which every token reads `top_k` per head.

    A query is split in two halves, each half is compared with `n_keys` keys, and the best sums of a first and
    a second key name the slots that are read (1907.05242, section 3; Memory+ of 2412.09764, section 3).

    Attributes:
        layers: decoder layers that read; negative counts from the end. None: up to three, evenly spaced and
            centred (2412.09764, section 3.1).
        n_keys: keys in each half; the table has `n_keys`² slots.
        heads: independent lookups a token, whose results are summed.
        top_k: slots read by each head.
        key_dim: width of a head's query, even; each key has half of it.
        value_dim: width of a slot; None: the model's width.
        placement: `beside` adds to what the MLP gives out, `replace` takes its place.
        share_values: one table for all layers instead of one each.
        qk_norm: RMSNorm with a learned scale on both halves of the query and on the keys, so that scores
            neither vanish nor saturate.
        score: how the scores of the chosen slots become weights: `softmax` within each head, `sigmoid` or
            `relu` of each.
        gate: what multiplies the values that were read: `none`, `silu` (Memory+: y ⊙ silu(x W), per channel)
            or `learned` (one sigmoid a token that starts closed, at `gate_bias`: memory speaks only where
            training opens it).
        gate_bias: where the `learned` gate starts, before the sigmoid.
        value_proj: a linear map from `value_dim` to the model's width. It starts at 0, so that the model is
            what it was; without it the values themselves must start at 0.
        dropout: on the weights of the slots, in training.
        key_init: `uniform` in ±(`key_dim`/2)^-½, or `normal` with that standard deviation.
        value_init: `normal` with standard deviation `value_dim`^-½, or `zero`.
    """

    type: Literal["product_key"] = "product_key"
    layers: list[Layer] | None = Field(None, min_length=1)
    n_keys: Width = 256
    heads: Part = 4
    top_k: Part = 32
    key_dim: Width = Field(128, ge=2)
    value_dim: Width | None = None
    placement: Literal["beside", "replace"] = "beside"
    share_values: bool = True
    qk_norm: bool = True
    score: Literal["softmax", "sigmoid", "relu"] = "softmax"
    gate: Literal["none", "silu", "learned"] = "silu"
    gate_bias: Bias = -2.0
    value_proj: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    key_init: Literal["uniform", "normal"] = "uniform"
    value_init: Literal["normal", "zero"] = "normal"

    @model_validator(mode="after")
    def _fits_together(self):
        if self.top_k > self.n_keys:
            raise ConfigError(
                f"top_k: {self.top_k} is more than n_keys {self.n_keys}; a head takes its best top_k of each half's keys"
            )
        if self.key_dim % 2:
            raise ConfigError(f"key_dim: {self.key_dim} is odd; a query is split in two halves of one width")
        starts_at_zero = self.value_proj or self.value_init == "zero"
        if self.placement == "beside" and not starts_at_zero:
            raise ConfigError(
                "value_init: must be zero without value_proj, so that the model starts as it was"
            )
        if self.value_proj and self.value_init == "zero":
            raise ConfigError(
                "value_init: zero values and a value_proj that starts at 0 would never learn; use normal"
            )
        return self
