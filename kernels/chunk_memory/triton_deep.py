"""Memories of two layers in Triton, chunk after chunk: what is written into them.

With A1, A2 the weights at the chunk's start (at the first chunk the anchor), H = K A1 and A = gelu(H), the layers are
linear memories with keys K and A that are written to (`sources.py`)

    w2 = 2 (V − A A2)        E = w2 A2ᵀ        w1 = E ∘ gelu'(H)

A program goes through the chunks of one memory. A layer's columns need all of the other layer, so it cannot be split
over programs; tiles and states pass between the steps of a chunk through global memory, and fit whatever the width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_decay import Decays
from .triton_tiles import PRECISION, Layout, load, locate, outer_tile, store, times

BLOCK = 16 if torch.version.hip else 32  # rows and columns of a tile: more takes too many registers


class Written(NamedTuple):
    """Of every token, (N, T, width) in float32."""

    h: Tensor  # K A1
    a: Tensor  # gelu(H)
    error: Tensor  # w2 A2ᵀ
    w_1: Tensor
    w_2: Tensor


@triton.jit
def gelu(x):
    return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def slope(x):
    """gelu'."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density(x)


@triton.jit
def density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def advance(
    k,
    w,
    last,
    keep,
    now,
    row,
    chunk,
    step,
    n_tokens,
    lead,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A layer's state after a chunk, from that before it at `now`, its keys and what is written."""
    PARTS: tl.constexpr = 1 + MOMENTUM
    after = now + PARTS * D_IN * D_OUT
    for begin in tl.range(0, D_IN, BLOCK, num_stages=1):
        key = begin + tl.arange(0, BLOCK)
        for start in tl.range(0, D_OUT, BLOCK, num_stages=1):
            value = start + tl.arange(0, BLOCK)
            M = tl.load(keep + step * (2 * PARTS - 1)) * load(now, key, value, D_OUT, key < D_IN)
            if MOMENTUM:
                S = load(now, D_IN + key, value, D_OUT, key < D_IN)
                M += tl.load(keep + step * 3 + 2) * S
                S *= tl.load(keep + step * 3 + 1)
                S += outer_tile(
                    k, w, last, 1, row, chunk, step, n_tokens, lead, key, value,
                    C, D_IN, D_OUT, BLOCK, PARTS, PRECISION,
                )  # fmt: skip
                store(after, S, D_IN + key, value, D_OUT, key < D_IN)
            M += outer_tile(
                k, w, last, 0, row, chunk, step, n_tokens, lead, key, value,
                C, D_IN, D_OUT, BLOCK, PARTS, PRECISION,
            )  # fmt: skip
            store(after, M, key, value, D_OUT, key < D_IN)


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead"])
def two_layers_kernel(
    k,  # (N, T, D)
    v,  # (N, T, D_V)
    last,  # (steps, C, PARTS)
    keep,  # (steps, 1 or 3)
    anchor_1,  # (N, D, HIDDEN)
    anchor_2,  # (N, HIDDEN, D_V)
    h,  # (N, T, HIDDEN), out
    a,  # (N, T, HIDDEN), out
    error,  # (N, T, HIDDEN), out: w2 A2ᵀ
    w_1,  # (N, T, HIDDEN), out
    w_2,  # (N, T, D_V), out
    states_1,  # (N, n_chunks + 1, PARTS, D, HIDDEN), as in write_kernel
    states_2,  # (N, n_chunks + 1, PARTS, HIDDEN, D_V)
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
    row = tl.program_id(0).to(tl.int64)
    for chunk in tl.range(0, n_chunks, num_stages=1):
        step = row * n_chunks + chunk
        now_1 = states_1 + (step + row) * (1 + MOMENTUM) * D * HIDDEN
        now_2 = states_2 + (step + row) * (1 + MOMENTUM) * HIDDEN * D_V
        A_1 = tl.where(chunk == 0, anchor_1 + row * D * HIDDEN, now_1)
        A_2 = tl.where(chunk == 0, anchor_2 + row * HIDDEN * D_V, now_2)

        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, HIDDEN, BLOCK, num_stages=1):
                unit = begin + tl.arange(0, BLOCK)
                H = times(k, token, real, A_1, unit, D, HIDDEN, False, BLOCK, BLOCK, BLOCK, PRECISION)
                store(h, H, token, unit, HIDDEN, real)
                store(a, gelu(H), token, unit, HIDDEN, real)
        tl.debug_barrier()
        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, D_V, BLOCK, num_stages=1):
                value = begin + tl.arange(0, BLOCK)
                recalled = times(
                    a, token, real, A_2, value, HIDDEN, D_V, False, BLOCK, BLOCK, BLOCK, PRECISION
                )
                store(w_2, 2 * (load(v, token, value, D_V, real) - recalled), token, value, D_V, real)
        tl.debug_barrier()
        for first in tl.range(0, C, BLOCK, num_stages=1):
            place = first + tl.arange(0, BLOCK)
            token, real = locate(row, chunk, place, n_tokens, lead, C)
            for begin in tl.range(0, HIDDEN, BLOCK, num_stages=1):
                unit = begin + tl.arange(0, BLOCK)
                E = times(w_2, token, real, A_2, unit, D_V, HIDDEN, True, BLOCK, BLOCK, BLOCK, PRECISION)
                store(error, E, token, unit, HIDDEN, real)
                W = E * slope(load(h, token, unit, HIDDEN, real))
                store(w_1, W, token, unit, HIDDEN, real)
        tl.debug_barrier()

        advance(
            k, w_1, last, keep, now_1, row, chunk, step, n_tokens, lead,
            C, D, HIDDEN, BLOCK, MOMENTUM, PRECISION,
        )  # fmt: skip
        advance(
            a, w_2, last, keep, now_2, row, chunk, step, n_tokens, lead,
            C, HIDDEN, D_V, BLOCK, MOMENTUM, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()


def write_two_layers(
    layout: Layout,
    k: Tensor,
    v: Tensor,
    decay: Decays,
    starts: tuple[Tensor, ...],
    anchors: tuple[Tensor, ...],
) -> tuple[Written, list[Tensor]]:
    """What is written, and the states of both layers, (N, n_chunks + 1, P, d_in, d_out) in float32.

    k: (N, T, D), v: (N, T, D_V); starts: (N, P, d_in, d_out), anchors: (N, d_in, d_out), float32.
    """
    hidden, d_v = anchors[1].shape[1:]
    widths = hidden, hidden, hidden, hidden, d_v
    written = Written(*(decay.last.new_empty(*k.shape[:2], width) for width in widths))
    states = [start.new_empty(layout.n_rows, layout.n_chunks + 1, *start.shape[1:]) for start in starts]
    for x, start in zip(states, starts):
        x[:, 0] = start
    with torch.cuda.device_of(k):
        two_layers_kernel[layout.n_rows,](
            k, v, decay.last, decay.keep, *anchors, *written, *states, *layout.sizes,
            **options(layout, decay, *anchors),
        )  # fmt: skip
    return written, states


def options(layout: Layout, decay: Decays, anchor_1: Tensor, anchor_2: Tensor) -> dict:
    return {
        "C": layout.chunk_size,
        "D": anchor_1.shape[1],
        "HIDDEN": anchor_1.shape[2],
        "D_V": anchor_2.shape[2],
        "BLOCK": BLOCK,
        "MOMENTUM": decay.last.shape[2] - 1,
        "PRECISION": PRECISION,
        "num_warps": 4,
    }
