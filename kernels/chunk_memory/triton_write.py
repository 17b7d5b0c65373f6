"""Linear memories in Triton, chunk after chunk: what is written into them, and the gradients.

With U = targets − probes A, A the memory at the chunk's start (at the first chunk the anchor), W = scale U,

    M' = β_L M + f_L S + (G_L∘K)ᵀ W          S' = m_L S + (s∘K)ᵀ W

where β_L, f_L, m_L are `keep` and G_L, s are `last` (decay.py). A program goes through the chunks of one memory with a
few columns of its values; columns do not depend on each other. The state passes from chunk to chunk through global
memory, where it is wanted anyway: so its size is not limited by what a program can hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import BLOCK, PRECISION, Layout, load, load_column, locate, store, times

VALUES = 16  # columns of the values to a program


@triton.jit
def advance(
    k,
    W,
    last,
    keep,
    now,
    step,
    place,
    token,
    real,
    value,
    C: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    KEYS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns `value` of the state after a chunk, from those before it at `now` and the tile W that is written."""
    PARTS: tl.constexpr = 1 + MOMENTUM
    after = now + PARTS * D * D_V
    into_M = W * load_column(last, step * C + place, 0, PARTS, place < C)[:, None]
    if MOMENTUM:
        into_S = W * load_column(last, step * C + place, 1, PARTS, place < C)[:, None]
    for begin in tl.range(0, D, KEYS, num_stages=1):
        key = begin + tl.arange(0, KEYS)
        M = tl.load(keep + step * (2 * PARTS - 1)) * load(now, key, value, D_V, key < D)
        if MOMENTUM:
            S = load(now, D + key, value, D_V, key < D)
            M += tl.load(keep + step * 3 + 2) * S
            K = load(k, token, key, D, real)
            S *= tl.load(keep + step * 3 + 1)
            S = tl.dot(tl.trans(K), into_S, S, input_precision=PRECISION)
            store(after, S, D + key, value, D_V, key < D)
        K = load(k, token, key, D, real)  # once more: to hold it takes more registers
        M = tl.dot(tl.trans(K), into_M, M, input_precision=PRECISION)
        store(after, M, key, value, D_V, key < D)


@triton.jit
def owed(
    x,
    last,
    after,
    step,
    place,
    token,
    real,
    column,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    FLIP: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of what a chunk's w (X: its keys; with FLIP its keys, X: its w) owe to the state after it.

    after: where the gradient of that state is.
    """
    total = tl.zeros((PLACES, COLUMNS), tl.float32)
    for part in tl.range(0, 1 + MOMENTUM, num_stages=1):  # unrolled it takes more registers
        matrix = after + part * D_IN * D_OUT
        product = times(x, token, real, matrix, column, D_IN, D_OUT, FLIP, PLACES, COLUMNS, BLOCK, PRECISION)
        total += load_column(last, step * C + place, part, 1 + MOMENTUM, place < C)[:, None] * product
    return total


@triton.jit
def retreat(keep, now, step, key, value, dA, D: tl.constexpr, D_V: tl.constexpr, MOMENTUM: tl.constexpr):
    """Adds to the tile [key, value] of the gradient of the state at `now` what the state after the chunk owes to it.

    dA: what it has as the anchor of its chunk.
    """
    PARTS: tl.constexpr = 1 + MOMENTUM
    after = now + PARTS * D * D_V
    dM = load(after, key, value, D_V, key < D)
    d_now = load(now, key, value, D_V, key < D) + tl.load(keep + step * (2 * PARTS - 1)) * dM + dA
    store(now, d_now, key, value, D_V, key < D)
    if MOMENTUM:
        dS = load(after, D + key, value, D_V, key < D)
        dS = tl.load(keep + step * 3 + 1) * dS + tl.load(keep + step * 3 + 2) * dM
        dS += load(now, D + key, value, D_V, key < D)
        store(now, dS, D + key, value, D_V, key < D)


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead"])
def write_kernel(
    k,  # (N, T, D)
    probes,  # (N, T, D)
    targets,  # (N, T, D_V)
    last,  # (steps, C, PARTS)
    keep,  # (steps, 1), with MOMENTUM (steps, 3): β, m, f
    anchor,  # (N, D, D_V)
    w,  # (N, T, D_V), out
    states,  # (N, n_chunks + 1, PARTS, D, D_V): M, S before each chunk and after the last; the first is given
    n_tokens,
    n_chunks,
    lead,
    C: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PLACES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SCALE: tl.constexpr,  # 0: W = targets
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = 1 + MOMENTUM
    STATE: tl.constexpr = PARTS * D * D_V
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    for chunk in tl.range(0, n_chunks, num_stages=1):
        step = row * n_chunks + chunk
        token, real = locate(row, chunk, place, n_tokens, lead, C)
        now = states + (step + row) * STATE
        W = load(targets, token, value, D_V, real)
        if SCALE:
            start = tl.where(chunk == 0, anchor + row * D * D_V, now)
            recalled = times(
                probes, token, real, start, value, D, D_V, False, PLACES, VALUES, KEYS, PRECISION
            )
            W = SCALE * (W - recalled)
        store(w, W, token, value, D_V, real)

        advance(k, W, last, keep, now, step, place, token, real, value, C, D, D_V, KEYS, MOMENTUM, PRECISION)
        tl.debug_barrier()  # the next chunk reads what other threads stored


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "lead"])
def write_backward_kernel(
    k,  # (N, T, D)
    probes,  # (N, T, D)
    last,  # (steps, C, PARTS)
    keep,  # (steps, 1 or 3)
    d_w,  # (N, T, D_V): what the reads owe to w
    d_states,  # (N, n_chunks + 1, PARTS, D, D_V): what the reads owe to the states; out: all that is owed to them
    d_targets,  # (N, T, D_V), out
    d_anchor,  # (N, D, D_V), out
    n_tokens,
    n_chunks,
    lead,
    C: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    PLACES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = 1 + MOMENTUM
    STATE: tl.constexpr = PARTS * D * D_V
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    for back in tl.range(0, n_chunks, num_stages=1):
        chunk = n_chunks - 1 - back
        step = row * n_chunks + chunk
        token, real = locate(row, chunk, place, n_tokens, lead, C)
        now = d_states + (step + row) * STATE
        dW = load(d_w, token, value, D_V, real)
        dW += owed(
            k, last, now + STATE, step, place, token, real, value,
            C, D, D_V, False, PLACES, VALUES, KEYS, MOMENTUM, PRECISION,
        )  # fmt: skip
        if SCALE:
            dW *= SCALE
        store(d_targets, dW, token, value, D_V, real)
        for begin in tl.range(0, D, KEYS, num_stages=1):
            key = begin + tl.arange(0, KEYS)
            dA = tl.zeros((KEYS, VALUES), tl.float32)
            if SCALE:
                probe = tl.trans(load(probes, token, key, D, real))
                dA = -tl.dot(probe, dW, input_precision=PRECISION)
                if chunk == 0:
                    store(d_anchor + row * D * D_V, dA, key, value, D_V, key < D)
                    dA = tl.zeros((KEYS, VALUES), tl.float32)
            retreat(keep, now, step, key, value, dA, D, D_V, MOMENTUM)
        tl.debug_barrier()


def write(
    layout: Layout,
    k: Tensor,
    probes: Tensor,
    targets: Tensor,
    decay,
    start: Tensor,
    anchor: Tensor,
    scale: int,
) -> tuple[Tensor, Tensor]:
    """w (N, T, D_V) and the states (N, n_chunks + 1, P, D, D_V), all float32.

    k, probes: (N, T, D), targets: (N, T, D_V); start: (N, P, D, D_V), anchor: (N, D, D_V), float32.
    """
    width = targets.shape[-1]
    w = torch.empty_like(targets, dtype=torch.float32)
    states = start.new_empty(layout.n_rows, layout.n_chunks + 1, *start.shape[1:])
    states[:, 0] = start
    grid = layout.n_rows, triton.cdiv(width, VALUES)
    with torch.cuda.device_of(k):
        write_kernel[grid](
            k, probes, targets, decay.last, decay.keep, anchor, w, states, *layout.sizes,
            **options(layout, start, scale), num_warps=4,
        )  # fmt: skip
    return w, states


def write_backward(
    layout: Layout, k: Tensor, probes: Tensor, decay, d_w: Tensor, d_states: Tensor, scale: int
) -> tuple[Tensor, Tensor]:
    """Gradients of targets and of the anchor, float32. d_states holds what is owed to the states by others; to it is
    added what the chunks owe."""
    d_targets, d_anchor = torch.empty_like(d_w), torch.empty_like(d_states[:, 0, 0])
    grid = layout.n_rows, triton.cdiv(d_w.shape[-1], VALUES)
    with torch.cuda.device_of(k):
        write_backward_kernel[grid](
            k, probes, decay.last, decay.keep, d_w, d_states, d_targets, d_anchor, *layout.sizes,
            **options(layout, d_states[:, 0], scale), num_warps=4,
        )  # fmt: skip
    return d_targets, d_anchor


def options(layout: Layout, state: Tensor, scale: int) -> dict:
    _, parts, d, d_v = state.shape
    return {
        "C": layout.chunk_size,
        "D": d,
        "D_V": d_v,
        "PLACES": layout.places,
        "KEYS": BLOCK,
        "VALUES": VALUES,
        "MOMENTUM": parts - 1,
        "SCALE": scale,
        "PRECISION": PRECISION,
    }
