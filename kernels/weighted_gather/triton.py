"""Weighted sums of table rows on a GPU: three Triton kernels, each bound by the memory it reads or writes.

No atomics: every element of every result is summed by one program in a fixed order, in float32 (float64 for float64
tables). Offsets are 64-bit: a table of 1M rows x 1024 x 2 bytes exceeds 2^31. The width and the stride of the
table are compile-time constants, as they are constants of a model.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

COLUMNS = 1024  # widest block of columns for one program: 4 warps with 16 bytes of bfloat16 per thread


def weighted_gather(
    table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, sparse: bool = False
) -> torch.Tensor:
    """As the reference, but an index outside the table reads a row of zeros that gets no gradient."""
    if table.stride(1) != 1:
        table = table.contiguous()
    return WeightedGather.apply(table, indices.contiguous(), weights.contiguous(), sparse)


class WeightedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, sparse: bool):
        ctx.save_for_backward(table, indices, weights)
        ctx.sparse = sparse
        return gather(table, indices, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        table, indices, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_table = table_gradient(grad, indices, weights, len(table), ctx.sparse)
        if ctx.needs_input_grad[2]:
            grad_weights = weight_gradient(grad, table, indices, weights.dtype)
        return grad_table, None, grad_weights, None


def gather(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(..., value_dim)."""
    *shape, n = indices.shape
    width = table.shape[1]
    out = table.new_empty(*shape, width)
    block = min(COLUMNS, triton.next_power_of_2(max(1, width)))
    grid = (math.prod(shape), triton.cdiv(width, block))
    if out.numel():
        with torch.cuda.device_of(table):
            gather_kernel[grid](
                table,
                indices,
                weights,
                out,
                len(table),
                n,
                WIDTH=width,
                STRIDE=table.stride(0),
                BLOCK=block,
                READS=8,
                SUM=sum_dtype(table.dtype),
                num_warps=max(1, block // 256),
            )
    return out


def weight_gradient(
    grad: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(..., n) of `dtype`: grad[...] · table[indices[..., n]]."""
    *shape, n = indices.shape
    width = table.shape[1]
    out = torch.empty_like(indices, dtype=dtype)
    reads = 16
    grid = (math.prod(shape), triton.cdiv(n, reads))
    if out.numel():
        with torch.cuda.device_of(table):
            weight_gradient_kernel[grid](
                grad,
                table,
                indices,
                out,
                len(table),
                n,
                WIDTH=width,
                STRIDE=table.stride(0),
                BLOCK=min(256, triton.next_power_of_2(max(1, width))),
                READS=reads,
                SUM=sum_dtype(table.dtype),
                num_warps=4,
            )
    return out


def table_gradient(
    grad: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, n_rows: int, sparse: bool
) -> torch.Tensor:
    """(n_rows, value_dim): Σ over the reads of a row of weight · grad[bag]. Waits for the device only if `sparse`."""
    width = grad.shape[-1]
    # Indices outside the table keep apart from all rows, and 32-bit keys sort twice as fast.
    keys = indices.view(-1).clamp(-1, n_rows).to(torch.int32 if n_rows < 2**31 - 1 else torch.int64)
    rows, order = keys.sort(stable=True)
    ends = torch.searchsorted(rows, rows, right=True)
    first = (rows >= 0) & (rows < n_rows)
    first[1:] &= rows[1:] != rows[:-1]
    if sparse:
        unique = rows[first].long()
        slots = torch.where(first, first.cumsum(0) - 1, -1)
        values = grad.new_empty(len(unique), width)
    else:
        slots = torch.where(first, rows, -1)
        values = grad.new_zeros(n_rows, width)

    block = min(COLUMNS, triton.next_power_of_2(max(1, width)))
    grid = (len(rows), triton.cdiv(width, block))
    if len(rows) and width:
        with torch.cuda.device_of(grad):
            table_gradient_kernel[grid](
                grad,
                weights.view(-1)[order],
                order // indices.shape[-1],
                slots,
                ends,
                values,
                WIDTH=width,
                BLOCK=block,
                READS=4,
                SUM=sum_dtype(grad.dtype),
                num_warps=max(1, block // 256),
            )
    if not sparse:
        return values
    return torch.sparse_coo_tensor(
        unique[None], values, (n_rows, width), is_coalesced=True, check_invariants=False
    )


def sum_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def gather_kernel(
    table,
    indices,
    weights,
    out,
    n_rows,
    n,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    SUM: tl.constexpr,
):
    """One program per bag and block of columns; READS rows are in flight at a time."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros((BLOCK,), SUM)
    for begin in range(0, n, READS):
        reads = begin + tl.arange(0, READS)
        row = tl.load(indices + bag * n + reads, mask=reads < n, other=-1).to(tl.int64)
        weight = tl.load(weights + bag * n + reads, mask=reads < n, other=0).to(SUM)
        exists = (row >= 0) & (row < n_rows)
        values = tl.load(
            table + row[:, None] * STRIDE + columns[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0,
        ).to(SUM)
        total += tl.sum(weight[:, None] * values, 0)
    tl.store(out + bag * WIDTH + columns, total, mask=inside)


@triton.jit
def weight_gradient_kernel(
    grad,
    table,
    indices,
    out,
    n_rows,
    n,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    SUM: tl.constexpr,
):
    """One program per READS reads of one bag; it goes along the columns and adds up across them at the end."""
    bag = tl.program_id(0).to(tl.int64)
    reads = tl.program_id(1) * READS + tl.arange(0, READS)
    row = tl.load(indices + bag * n + reads, mask=reads < n, other=-1).to(tl.int64)
    exists = (row >= 0) & (row < n_rows)
    products = tl.zeros((READS, BLOCK), SUM)
    for begin in range(0, WIDTH, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        direction = tl.load(grad + bag * WIDTH + columns, mask=inside, other=0).to(SUM)
        values = tl.load(
            table + row[:, None] * STRIDE + columns[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0,
        ).to(SUM)
        products += values * direction[None, :]
    tl.store(out + bag * n + reads, tl.sum(products, 1), mask=reads < n)


@triton.jit
def table_gradient_kernel(
    grad,
    weights,
    bags,
    slots,
    ends,
    values,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    SUM: tl.constexpr,
):
    """One program per read, in the order of the rows (weights and bags are in that order), and block of columns.

    The first read of a row (slots[position] >= 0: the row of `values` to write) goes through all reads of its row,
    up to ends[position]; the others have nothing to do.
    """
    position = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + position).to(tl.int64)
    if slot >= 0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        total = tl.zeros((BLOCK,), SUM)
        end = tl.load(ends + position)
        for begin in range(position, end, READS):
            reads = begin + tl.arange(0, READS)
            bag = tl.load(bags + reads, mask=reads < end, other=0)
            weight = tl.load(weights + reads, mask=reads < end, other=0).to(SUM)
            directions = tl.load(
                grad + bag[:, None] * WIDTH + columns[None, :],
                mask=(reads < end)[:, None] & inside[None, :],
                other=0,
            ).to(SUM)
            total += tl.sum(weight[:, None] * directions, 0)
        tl.store(values + slot * WIDTH + columns, total, mask=inside)


def compile_case(
    kernel: triton.JITFunction, pointers: dict, dtype: str, num_warps: int, **constexprs
) -> dict:
    """A case for tests/kernels/test_compile.py: what a launch with width 1024 and 128 reads a bag compiles."""
    constexprs = {"WIDTH": 1024, "SUM": tl.float32, **constexprs}
    signature = {**pointers, "n_rows": "i32", "n": "i32", **{name: "constexpr" for name in constexprs}}
    return {
        "name": f"{kernel.__name__}_{dtype}",
        "kernel": kernel,
        "signature": {name: signature[name] for name in kernel.arg_names},
        "constexprs": constexprs,
        "num_warps": num_warps,
    }


COMPILE_CASES = []
for _dtype in ("bf16", "fp32"):
    _f, _i = f"*{_dtype}", "*i64"
    COMPILE_CASES += [
        compile_case(
            gather_kernel,
            {"table": _f, "indices": _i, "weights": _f, "out": _f},
            _dtype,
            num_warps=4,
            STRIDE=1024,
            BLOCK=1024,
            READS=8,
        ),
        compile_case(
            weight_gradient_kernel,
            {"grad": _f, "table": _f, "indices": _i, "out": _f},
            _dtype,
            num_warps=4,
            STRIDE=1024,
            BLOCK=256,
            READS=16,
        ),
        compile_case(
            table_gradient_kernel,
            {"grad": _f, "weights": _f, "bags": _i, "slots": "*i32", "ends": _i, "values": _f},
            _dtype,
            num_warps=4,
            BLOCK=1024,
            READS=4,
        ),
    ]
