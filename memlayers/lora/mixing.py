"""Mixing adapters: several LoRAs side by side in the state of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.state import Fields


def mixed(rows: Sequence[Sequence[tuple[Fields, float]]], top_k: int, like: Fields) -> Fields:
    """The fields of a state whose rows read the weighted sum of their adapters: Σ w B A = [w₁B₁ w₂B₂ …] [A₁; A₂; …].

    Args:
        rows: for each row its adapters, at most `top_k`, and their weights.
        like: the fields of one row of rank r: A (1, r, in_features), B (1, out_features, r).

    Returns:
        A (rows, top_k · r, in_features) and B (rows, out_features, top_k · r), float32; zeros where a row has fewer.
    """
    fields = {}
    for field, one in like.items():
        rank, scaled = (1, False) if field.endswith(".lora_A") else (2, True)
        shape = [len(rows), *one.shape[1:]]
        shape[rank] *= top_k
        fields[field] = torch.zeros(shape)
        for row, adapters in enumerate(rows):
            for i, (adapter, weight) in enumerate(adapters):
                r = adapter[field].shape[rank - 1]
                place = fields[field][row].narrow(rank - 1, i * r, r)
                place.copy_(adapter[field] * weight if scaled else adapter[field])
    return fields
