"""Weighted sums of table rows in plain torch: the truth that the other paths are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def weighted_gather(
    table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, sparse: bool = False
) -> torch.Tensor:
    """out[...] = Σ_n weights[..., n] · table[indices[..., n]], summed in float32 (float64 for a float64 table).

    Materialises all rows read, (..., n, value_dim). With `sparse` the table's gradient holds the rows read only.
    """
    check_range(indices, len(table))
    precise = torch.promote_types(table.dtype, torch.float32)
    if sparse:
        table = RowSparseGradient.apply(table, indices)
    rows = F.embedding(indices, table.to(precise))
    return (weights.to(precise)[..., None] * rows).sum(-2).to(table.dtype)


def check_range(indices: torch.Tensor, n_rows: int) -> None:
    """IndexError if an index is not in [0, n_rows). Reads the extremes, so on a GPU it waits for the device."""
    if indices.numel() == 0:
        return
    for index in map(int, indices.aminmax()):
        if not 0 <= index < n_rows:
            raise IndexError(f"indices: {index} is not a row of the table, which has {n_rows} rows")


class RowSparseGradient(torch.autograd.Function):
    """The table itself; its gradient, dense when it arrives, leaves with the rows that were read and no others."""

    @staticmethod
    def forward(ctx, table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        return table.view_as(table)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (indices,) = ctx.saved_tensors
        rows = indices.unique()
        sparse = torch.sparse_coo_tensor(
            rows[None].long(), grad[rows], grad.shape, is_coalesced=True, check_invariants=True
        )
        return sparse, None
