"""Memories of two layers in Triton, chunk after chunk from the last one: gradients of what is written (`triton_deep.py`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_decay import Decays
from .triton_deep import Written, density, options, slope
from .triton_tiles import Layout, load, locate, outer_tile, store, times
from .triton_write import owed, retreat


@triton.jit
def curvature(x):
    """gelu''."""
    return density(x) * (2 - x * x)


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead"])
def two_layers_backward_kernel(
    k,  # (N, T, D)
    last,  # (steps, C, PARTS)
    keep,  # (steps, 1 or 3)
    anchor_2,  # (N, HIDDEN, D_V)
    h,  # (N, T, HIDDEN)
    a,  # (N, T, HIDDEN)
    error,  # (N, T, HIDDEN)
    w_2,  # (N, T, D_V)
    states_2,  # (N, n_chunks + 1, PARTS, HIDDEN, D_V)
    d_a,  # (N, T, HIDDEN): what the reads owe to a
    d_w_1,  # (N, T, HIDDEN): what the reads owe to w_1; overwritten
    d_w_2,  # (N, T, D_V): what the reads owe to w_2; overwritten
    d_states_1,  # (N, n_chunks + 1, PARTS, D, HIDDEN): what the reads owe to them; out: all that is owed to them
    d_states_2,  # likewise, (N, n_chunks + 1, PARTS, HIDDEN, D_V)
    d_h,  # (N, T, HIDDEN), out
    d_v,  # (N, T, D_V), out
    d_anchor_1,  # (N, D, HIDDEN), out
    d_anchor_2,  # (N, HIDDEN, D_V), out
    n_tokens,
    n_chunks,
    lead,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = 1 + MOMENTUM
    row = tl.program_id(0).to(tl.int64)
    for done in tl.range(0, n_chunks, num_stages=1):
        chunk = n_chunks - 1 - done
        step = row * n_chunks + chunk
        offset_1 = (step + row) * PARTS * D * HIDDEN
        offset_2 = (step + row) * PARTS * HIDDEN * D_V
        now_1, now_2 = d_states_1 + offset_1, d_states_2 + offset_2
        after_1, after_2 = now_1 + PARTS * D * HIDDEN, now_2 + PARTS * HIDDEN * D_V
        A_2 = tl.where(chunk == 0, anchor_2 + row * HIDDEN * D_V, states_2 + offset_2)

        # what w2 and w1 owe to the states after the chunk; w2 A2ᵀ and H to w1
        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, D_V, BLOCK, num_stages=1):
                value = begin + tl.arange(0, BLOCK)
                dW = load(d_w_2, token, value, D_V, real)
                dW += owed(
                    a, last, after_2, step, place, token, real, value,
                    C, HIDDEN, D_V, False, BLOCK, BLOCK, BLOCK, MOMENTUM, PRECISION,
                )  # fmt: skip
                store(d_w_2, dW, token, value, D_V, real)
        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, HIDDEN, BLOCK, num_stages=1):
                unit = begin + tl.arange(0, BLOCK)
                dW = load(d_w_1, token, unit, HIDDEN, real)
                dW += owed(
                    k, last, after_1, step, place, token, real, unit,
                    C, D, HIDDEN, False, BLOCK, BLOCK, BLOCK, MOMENTUM, PRECISION,
                )  # fmt: skip
                H = load(h, token, unit, HIDDEN, real)
                E = load(error, token, unit, HIDDEN, real)
                store(d_h, dW * E * curvature(H), token, unit, HIDDEN, real)
                store(d_w_1, dW * slope(H), token, unit, HIDDEN, real)  # now the gradient of w2 A2ᵀ
        tl.debug_barrier()

        # w2 to w1; v to w2
        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, D_V, BLOCK, num_stages=1):
                value = begin + tl.arange(0, BLOCK)
                dW = load(d_w_2, token, value, D_V, real)
                dW += times(
                    d_w_1, token, real, A_2, value, HIDDEN, D_V, False, BLOCK, BLOCK, BLOCK, PRECISION
                )
                store(d_v, 2 * dW, token, value, D_V, real)
        tl.debug_barrier()

        # a to the state after the chunk and to w2; H to a
        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, HIDDEN, BLOCK, num_stages=1):
                unit = begin + tl.arange(0, BLOCK)
                dA = load(d_a, token, unit, HIDDEN, real)
                dA += owed(
                    w_2, last, after_2, step, place, token, real, unit,
                    C, D_V, HIDDEN, True, BLOCK, BLOCK, BLOCK, MOMENTUM, PRECISION,
                )  # fmt: skip
                dA -= times(d_v, token, real, A_2, unit, D_V, HIDDEN, True, BLOCK, BLOCK, BLOCK, PRECISION)
                dH = load(d_h, token, unit, HIDDEN, real)
                dH += dA * slope(load(h, token, unit, HIDDEN, real))
                store(d_h, dH, token, unit, HIDDEN, real)
        tl.debug_barrier()

        # the anchors and states of both layers
        for begin in tl.range(0, HIDDEN, BLOCK, num_stages=1):
            unit = begin + tl.arange(0, BLOCK)
            for start in tl.range(0, D, BLOCK, num_stages=1):
                key = start + tl.arange(0, BLOCK)
                d_anchor = outer_tile(
                    k, d_h, last, 0, row, chunk, step, n_tokens, lead, key, unit,
                    C, D, HIDDEN, BLOCK, 0, PRECISION,
                )  # fmt: skip
                if chunk == 0:
                    store(d_anchor_1 + row * D * HIDDEN, d_anchor, key, unit, HIDDEN, key < D)
                    d_anchor = tl.zeros((BLOCK, BLOCK), tl.float32)
                retreat(keep, now_1, step, key, unit, d_anchor, D, HIDDEN, MOMENTUM)
        for begin in tl.range(0, D_V, BLOCK, num_stages=1):
            value = begin + tl.arange(0, BLOCK)
            for start in tl.range(0, HIDDEN, BLOCK, num_stages=1):
                unit = start + tl.arange(0, BLOCK)
                d_anchor = outer_tile(
                    d_w_1, w_2, last, 0, row, chunk, step, n_tokens, lead, unit, value,
                    C, HIDDEN, D_V, BLOCK, 0, PRECISION,
                )  # fmt: skip
                d_anchor -= outer_tile(
                    a, d_v, last, 0, row, chunk, step, n_tokens, lead, unit, value,
                    C, HIDDEN, D_V, BLOCK, 0, PRECISION,
                )  # fmt: skip
                if chunk == 0:
                    store(d_anchor_2 + row * HIDDEN * D_V, d_anchor, unit, value, D_V, unit < HIDDEN)
                    d_anchor = tl.zeros((BLOCK, BLOCK), tl.float32)
                retreat(keep, now_2, step, unit, value, d_anchor, HIDDEN, D_V, MOMENTUM)
        tl.debug_barrier()


def write_two_layers_backward(
    layout: Layout,
    k: Tensor,
    decay: Decays,
    anchors: tuple[Tensor, ...],
    written: Written,
    states_2: Tensor,
    d_a: Tensor,
    d_w: list[Tensor],
    d_states: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of H, (N, T, hidden), of v and of the anchors, float32.

    d_a, d_w and d_states hold what the reads owe to A, to w1 and w2, and to the states of both layers. d_w is
    overwritten, and to d_states is added what the chunks owe.
    """
    d_h, d_v = torch.empty_like(written.h), torch.empty_like(written.w_2)
    d_anchors = [torch.empty_like(x) for x in anchors]
    with torch.cuda.device_of(k):
        two_layers_backward_kernel[layout.n_rows,](
            k, decay.last, decay.keep, anchors[1], written.h, written.a, written.error, written.w_2, states_2,
            d_a, *d_w, *d_states, d_h, d_v, *d_anchors, *layout.sizes, **options(layout, decay, *anchors),
        )  # fmt: skip
    return d_h, d_v, d_anchors
