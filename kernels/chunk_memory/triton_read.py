"""Linear memories in Triton, all chunks at the same time: what is read from them, and the gradients.

    O = Σ_p c_p ∘ (X S_p) + (X Kᵀ ∘ G) V

is a read with queries X, keys K, writes V, states S_p = M, S before the chunk and decays c_p, G (decay.py). Four
gradients have the same form, with other things in the places of these (`read_backward`): one kernel serves them all.
Each program writes one tile of its result; nothing is added up across programs but small sums, in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import BLOCK, PRECISION, Layout, load, load_column, locate, outer_tile, store, times


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead", "n_steps"])
def mix_kernel(
    x,  # (N, T, D_IN)
    keys,  # (N, T, D_IN)
    values,  # (N, T, D_OUT)
    response,  # (steps, C, C); with FLIP_RESPONSE its transpose is meant
    states,  # (N, n_chunks + 1, STORED, D_IN, D_OUT); with FLIP_STATES (..., D_OUT, D_IN)
    coefficients,  # (steps, C, PARTS)
    other,  # (N, T, D_OUT)
    out,  # (N, T, D_OUT), out
    d_coefficients,  # (tiles, steps, C, PARTS), out: sums of other ∘ (X S_p) over the columns of a tile
    n_tokens,
    n_chunks,
    lead,
    n_steps,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # parts of the states that are taken
    STORED: tl.constexpr,
    PAIRS: tl.constexpr,  # whether there is the term with K and V
    WEIGHTED: tl.constexpr,  # whether there are coefficients; without, all are 1
    GRADS: tl.constexpr,  # whether d_coefficients are wanted
    FLIP_STATES: tl.constexpr,
    FLIP_RESPONSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    row, chunk = step // n_chunks, step % n_chunks
    place = tl.arange(0, PLACES)
    token, real = locate(row, chunk, place, n_tokens, lead, C)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = states + (step + row) * STORED * D_IN * D_OUT if PARTS else states

    total = tl.zeros((PLACES, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        matrix = state + part * D_IN * D_OUT
        product = times(
            x, token, real, matrix, column, D_IN, D_OUT, FLIP_STATES, PLACES, BLOCK, BLOCK, PRECISION
        )
        if WEIGHTED:
            c = load_column(coefficients, step * C + place, part, PARTS, place < C)
            total += c[:, None] * product
        else:
            total += product
        if GRADS:
            d_c = tl.sum(product * load(other, token, column, D_OUT, real), 1)
            to = (tl.program_id(1) * n_steps + step) * C + place
            tl.store(d_coefficients + to * PARTS + part, d_c, mask=place < C)

    if PAIRS:
        for first in tl.range(0, C, BLOCK, num_stages=1):
            source = first + tl.arange(0, BLOCK)
            source_token, source_real = locate(row, chunk, source, n_tokens, lead, C)
            pairs = tl.zeros((PLACES, BLOCK), tl.float32)
            for begin in tl.range(0, D_IN, BLOCK, num_stages=1):
                i = begin + tl.arange(0, BLOCK)
                K = tl.trans(load(keys, source_token, i, D_IN, source_real))
                pairs = tl.dot(load(x, token, i, D_IN, real), K, pairs, input_precision=PRECISION)
            if FLIP_RESPONSE:
                pairs *= tl.trans(load(response, step * C + source, place, C, source < C))
            else:
                pairs *= load(response, step * C + place, source, C, place < C)
            V = load(values, source_token, column, D_OUT, source_real)
            total = tl.dot(pairs, V, total, input_precision=PRECISION)
    store(out, total, token, column, D_OUT, real)


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead"])
def outer_kernel(
    x,  # (N, T, D_IN)
    coefficients,  # (steps, C, PARTS)
    grad,  # (N, T, D_OUT)
    out,  # (N, n_chunks + 1, PARTS, D_IN, D_OUT), out: (c_p ∘ X)ᵀ grad for every chunk; the last is not written
    n_tokens,
    n_chunks,
    lead,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    row, chunk = step // n_chunks, step % n_chunks
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    for part in tl.static_range(PARTS):
        total = outer_tile(
            x, grad, coefficients, part, row, chunk, step, n_tokens, lead, i, column,
            C, D_IN, D_OUT, BLOCK, PARTS, PRECISION,
        )  # fmt: skip
        store(out, total, ((step + row) * PARTS + part) * D_IN + i, column, D_OUT, i < D_IN)


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead"])
def response_kernel(
    q,  # (N, T, D)
    k,  # (N, T, D)
    grad,  # (N, T, D_V)
    w,  # (N, T, D_V)
    out,  # (steps, C, C), out: QKᵀ ∘ grad Wᵀ
    n_tokens,
    n_chunks,
    lead,
    C: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    row, chunk = step // n_chunks, step % n_chunks
    place = tl.arange(0, PLACES)
    source = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, real = locate(row, chunk, place, n_tokens, lead, C)
    source_token, source_real = locate(row, chunk, source, n_tokens, lead, C)
    scores = tl.zeros((PLACES, BLOCK), tl.float32)
    for begin in tl.range(0, D, BLOCK, num_stages=1):
        i = begin + tl.arange(0, BLOCK)
        K = tl.trans(load(k, source_token, i, D, source_real))
        scores = tl.dot(load(q, token, i, D, real), K, scores, input_precision=PRECISION)
    d_weights = tl.zeros((PLACES, BLOCK), tl.float32)
    for begin in tl.range(0, D_V, BLOCK, num_stages=1):
        i = begin + tl.arange(0, BLOCK)
        W = tl.trans(load(w, source_token, i, D_V, source_real))
        d_weights = tl.dot(load(grad, token, i, D_V, real), W, d_weights, input_precision=PRECISION)
    store(out, scores * d_weights, step * C + place, source, C, place < C)


def mix(
    layout: Layout,
    x: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor] | None = None,
    states: Tensor | None = None,
    coefficients: Tensor | None = None,
    *,
    parts: int = 0,
    flip_states: bool = False,
    flip_response: bool = False,
    other: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """O as above, and, given `other`, the gradients (steps, C, P) of the coefficients if `other` is that of O.

    pairs: K, V and G. states: N blocks of n_chunks + 1, of which the first n_chunks are taken, and `parts` of each.
    """
    width = pairs[1].shape[-1] if pairs else states.shape[-2 if flip_states else -1]
    keys, values, response = pairs or (None, None, None)
    out = torch.empty(*x.shape[:-1], width, dtype=dtype, device=x.device)
    tiles = triton.cdiv(width, BLOCK)
    d_coefficients = None
    if other is not None:
        d_coefficients = coefficients.new_empty(tiles, *coefficients.shape)
    with torch.cuda.device_of(x):
        mix_kernel[layout.n_steps, tiles](
            x, keys, values, response, states, coefficients, other, out, d_coefficients, *layout.sizes,
            layout.n_steps, C=layout.chunk_size, D_IN=x.shape[-1], D_OUT=width, PLACES=layout.places, BLOCK=BLOCK,
            PARTS=parts, STORED=states.shape[2] if parts else 0, PAIRS=pairs is not None,
            WEIGHTED=coefficients is not None, GRADS=other is not None, FLIP_STATES=flip_states,
            FLIP_RESPONSE=flip_response, PRECISION=PRECISION, num_warps=4,
        )  # fmt: skip
    return out, None if other is None else d_coefficients.sum(0)


def outer(layout: Layout, x: Tensor, coefficients: Tensor, grad: Tensor) -> Tensor:
    """(N, n_chunks + 1, P, d_in, d_out): (c_p ∘ X)ᵀ grad of each chunk; the last is left open."""
    d_in, d_out, parts = x.shape[-1], grad.shape[-1], coefficients.shape[-1]
    out = coefficients.new_empty(layout.n_rows, layout.n_chunks + 1, parts, d_in, d_out)
    with torch.cuda.device_of(x):
        outer_kernel[layout.n_steps, triton.cdiv(d_in, BLOCK), triton.cdiv(d_out, BLOCK)](
            x, coefficients, grad, out, *layout.sizes, C=layout.chunk_size, D_IN=d_in, D_OUT=d_out,
            BLOCK=BLOCK, PARTS=parts, PRECISION=PRECISION, num_warps=4,
        )  # fmt: skip
    return out


def response_gradient(layout: Layout, q: Tensor, k: Tensor, grad: Tensor, w: Tensor) -> Tensor:
    """(steps, C, C)"""
    out = w.new_empty(layout.n_steps, layout.chunk_size, layout.chunk_size)
    with torch.cuda.device_of(q):
        response_kernel[layout.n_steps, triton.cdiv(layout.chunk_size, BLOCK)](
            q, k, grad, w, out, *layout.sizes, C=layout.chunk_size, D=q.shape[-1], D_V=w.shape[-1],
            PLACES=layout.places, BLOCK=BLOCK, PRECISION=PRECISION, num_warps=4,
        )  # fmt: skip
    return out
