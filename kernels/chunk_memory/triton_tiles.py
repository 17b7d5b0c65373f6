"""What the Triton kernels of this family share: how chunks lie in a stream of tokens, tiles, and precision.

A stream (N, T, width) holds the tokens of N = batch × heads memories. `lead` places of the first chunk were taken before
its first token, so token t stands in chunk (lead + t) // C at place (lead + t) % C; the last chunk may be incomplete.
"Step" is the number of a chunk of a memory: memory · n_chunks + chunk. What belongs to places (decays) is padded
to whole chunks, streams are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Products of float32 as exact as float32: three products of tensor cores on NVIDIA, a unit for float32 on AMD.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
BLOCK = 32  # rows or columns of a tile that a loop goes along: more spills registers


class Layout(NamedTuple):
    """n_rows: memories, batch × heads."""

    n_rows: int
    n_tokens: int
    n_chunks: int
    chunk_size: int
    lead: int

    @property
    def after(self) -> int:
        """Places of the last chunk that no token takes."""
        return self.n_chunks * self.chunk_size - self.lead - self.n_tokens

    @property
    def n_steps(self) -> int:
        return self.n_rows * self.n_chunks

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.n_tokens, self.n_chunks, self.lead

    @property
    def places(self) -> int:
        return max(16, triton.next_power_of_2(self.chunk_size))


@triton.jit
def locate(row, chunk, place, n_tokens, lead, C: tl.constexpr):
    """The token at each place of a chunk, counted over all memories, and whether there is one."""
    column = chunk * C - lead + place
    return row * n_tokens + column, (place < C) & (column >= 0) & (column < n_tokens)


@triton.jit
def load(pointer, rows, columns, WIDTH: tl.constexpr, real):
    """The tile [rows, columns] of a matrix with WIDTH columns, in float32; 0 where a row is not real."""
    mask = real[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, tile, rows, columns, WIDTH: tl.constexpr, real):
    mask = real[:, None] & (columns < WIDTH)[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * WIDTH + columns[None, :], tile, mask=mask)


@triton.jit
def load_column(pointer, rows, column, WIDTH: tl.constexpr, real):
    return tl.load(pointer + rows * WIDTH + column, mask=real, other=0.0)


@triton.jit
def times(
    x,
    rows,
    real,
    matrix,
    columns,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tile [rows, columns] of X (.., D_IN) times a matrix (D_IN, D_OUT); with FLIP it is stored as (D_OUT, D_IN)."""
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in tl.range(0, D_IN, BLOCK, num_stages=1):
        i = begin + tl.arange(0, BLOCK)
        if FLIP:
            factor = tl.trans(load(matrix, columns, i, D_IN, columns < D_OUT))
        else:
            factor = load(matrix, i, columns, D_OUT, i < D_IN)
        product = tl.dot(load(x, rows, i, D_IN, real), factor, product, input_precision=PRECISION)
    return product


@triton.jit
def outer_tile(
    x,
    y,
    coefficients,
    part,
    row,
    chunk,
    step,
    n_tokens,
    lead,
    rows,
    columns,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # columns of the coefficients; 0: all coefficients are 1
    PRECISION: tl.constexpr,
):
    """The tile [rows, columns] of (c ∘ X)ᵀ Y, summed over the tokens of a chunk; c is a column of (steps, C, PARTS)."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, C, BLOCK, num_stages=1):
        place = first + tl.arange(0, BLOCK)
        token, real = locate(row, chunk, place, n_tokens, lead, C)
        X = load(x, token, rows, D_IN, real)
        if PARTS:
            X *= load_column(coefficients, step * C + place, part, PARTS, place < C)[:, None]
        total = tl.dot(tl.trans(X), load(y, token, columns, D_OUT, real), total, input_precision=PRECISION)
    return total
