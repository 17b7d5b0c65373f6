"""What a cartridge starts from: the keys and values of a text's first tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..memory import Fields
from ..model import decoder_of
from ..writing import right_aligned


def keys_and_values(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, n_tokens: int, differentiable: bool
) -> Fields:
    """The fields of a cartridge that holds the first `n_tokens` tokens of each row, read by the base alone.

    Args:
        input_ids: (batch, tokens).
        mask: (batch, tokens) bool, False at padding, which may stand anywhere.
        differentiable: keep the graph to the base's parameters.
    """
    decoder, device = decoder_of(model), model.get_input_embeddings().weight.device
    input_ids, mask = input_ids.to(device), mask.to(device)
    order = (~mask).int().argsort(dim=1, stable=True)[:, :n_tokens]
    ids, used = input_ids.gather(1, order), mask.gather(1, order)
    ids, used = right_aligned(ids, used)  # as the fields are; positions count the real tokens
    positions, cache = (used.cumsum(1) - 1).clamp(min=0), DynamicCache()
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        decoder(
            input_ids=ids,
            attention_mask=used.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    fields = {"length": used.sum(1)}
    for i, layer in enumerate(cache.layers):
        fields[f"layers.{i}.keys"] = layer.keys.transpose(1, 2).float()
        fields[f"layers.{i}.values"] = layer.values.transpose(1, 2).float()
    return fields


def keys_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(key-value heads, head_dim) of each layer, as one token has them: configs name them in many ways."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    fields = keys_and_values(model, one, one == 0, 1, differentiable=False)
    return [tuple(tensor.shape[2:]) for field, tensor in fields.items() if field.endswith(".keys")]
