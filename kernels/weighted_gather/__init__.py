"""Weighted sums of table rows (the value lookup of a product-key memory), with gradients to weights and table."""

from __future__ import annotations

import torch

from ..paths import choose
from . import cpu, reference

__all__ = ["weighted_gather"]


def weighted_gather(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    sparse: bool = False,
    path: str | None = None,
) -> torch.Tensor:
    """out[...] = Σ_n weights[..., n] · table[indices[..., n]].

    Args:
        table: (n_rows, value_dim), any floating dtype.
        indices: (..., n) int32 or int64; rows may repeat, n and the leading shape may be empty.
        weights: (..., n) floating; need not have the table's dtype.
        sparse: the table's gradient is a coalesced `torch.sparse_coo` tensor of the rows read, sorted. (Accumulated
            into `.grad` it loses the flag `is_coalesced`, not the order.) Dense by default.
        path: "reference", "cpu" or "triton"; by default see `memlayers.kernels.paths`.

    Returns:
        (..., value_dim) in the table's dtype. Sums run in float32, in float64 for a float64 table. Results and
        gradients are bit-equal from run to run: no float atomics.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        IndexError: an index outside the table ("reference" and "cpu"). In Triton such a read counts as a row of
            zeros and gets no gradient.
    """
    check(table, indices, weights)
    path = choose("weighted_gather", table.device, path)
    if path == "reference":
        return reference.weighted_gather(table, indices, weights, sparse)
    if path == "cpu":
        return cpu.weighted_gather(table, indices, weights, sparse)
    from . import triton  # imported on first use: it needs the package triton

    return triton.weighted_gather(table, indices, weights, sparse)


def check(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> None:
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(
            f"table: must be (n_rows, value_dim) of floats, not {tuple(table.shape)} of {table.dtype}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: must be int32 or int64, not {indices.dtype}")
    if not weights.is_floating_point():
        raise TypeError(f"weights: must be floats, not {weights.dtype}")
    if indices.dim() == 0 or indices.shape != weights.shape:
        raise ValueError(
            f"indices {tuple(indices.shape)} and weights {tuple(weights.shape)}: must have one shape (..., n)"
        )
    devices = {table.device, indices.device, weights.device}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"table, indices and weights: must be on one device, not on {found}")
