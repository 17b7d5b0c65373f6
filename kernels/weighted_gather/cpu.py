"""Weighted sums of table rows on the CPU: every sum is a bag of FBGEMM, and the backward pass reads in row order.

Plain `F.embedding_bag` spends most of its time in the backward pass, on tables far larger than the caches. Here

- the reads are sorted by row, so that the gradient to the weights reads each row of the table once, in order;
- the gradient to the table is itself a weighted gather: its bags are the table's rows, and what they gather are the
  rows of grad_out, few enough to stay in the cache. Each row is written once, in order: deterministic, coalesced.

FBGEMM accumulates float16 and bfloat16 in float32. Nearly half of the time left for a dense gradient is Linux handing
out fresh pages of 4 KB; PyTorch asks for huge ones if THP_MEM_ALLOC_ENABLE=1 is in the environment.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .reference import check_range


def weighted_gather(
    table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, sparse: bool = False
) -> torch.Tensor:
    """As the reference, but the weights are rounded to the table's dtype first."""
    check_range(indices, len(table))
    return WeightedGather.apply(table, indices, weights.to(table.dtype), sparse)


class WeightedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, sparse: bool):
        ctx.save_for_backward(table, indices, weights)
        ctx.sparse = sparse
        *shape, n = indices.shape
        starts = torch.arange(math.prod(shape) + 1, dtype=indices.dtype) * n
        out = bag_sums(table, indices.reshape(-1), weights.reshape(-1), starts)
        return out.view(*shape, table.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        table, indices, weights = ctx.saved_tensors
        grad = grad.reshape(-1, table.shape[1]).contiguous()
        rows, order = indices.reshape(-1).sort(stable=True)
        bags = (order // max(1, indices.shape[-1])).to(rows.dtype)
        grad_table = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_table = table_gradient(grad, rows, bags, weights.reshape(-1)[order], len(table), ctx.sparse)
        if ctx.needs_input_grad[2]:
            grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
            grad_weights.view(-1)[order] = read_dots(grad, table, rows, bags)
        return grad_table, None, grad_weights, None


def bag_sums(
    table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """(bags, value_dim): the weighted sums of table[rows[starts[b] : starts[b + 1]]]."""
    return F.embedding_bag(
        rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def read_dots(
    grad: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, bags: torch.Tensor
) -> torch.Tensor:
    """grad[bags[r]] · table[rows[r]] for each read r: the gradient to its weight.

    The operator is private to PyTorch: it is what `F.embedding_bag` calls for the same purpose, there with reads in
    the order of the bags. It takes them in any order; the argument `offsets` it only checks.
    """
    offsets = bags.new_zeros(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, table, rows, offsets, bags, 0, -1)


def table_gradient(
    grad: torch.Tensor,
    rows: torch.Tensor,
    bags: torch.Tensor,
    weights: torch.Tensor,
    n_rows: int,
    sparse: bool,
) -> torch.Tensor:
    """Σ over the reads of a row of weight · grad[bag], for reads sorted by row; dense or row-sparse."""
    if sparse:
        unique, counts = torch.unique_consecutive(rows, return_counts=True)
    else:
        counts = torch.bincount(rows, minlength=n_rows)
    starts = F.pad(counts.cumsum(0), (1, 0)).to(bags.dtype)
    values = bag_sums(grad, bags, weights, starts)
    if not sparse:
        return values
    shape = (n_rows, values.shape[1])
    return torch.sparse_coo_tensor(
        unique[None].long(), values, shape, is_coalesced=True, check_invariants=False
    )
