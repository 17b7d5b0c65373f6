"""The decays of a chunk (`decay.py`) in Triton: one program a chunk goes along its tokens, and back for the gradients.

Rows are those of decay.py: what M_t and S_t have of M_0, S_0 and of what the tokens write, at step size 1. Row t of S
is η_t times the row before it, and 1 for token t; row t of M is 1 − α_t times the row before it, and the row of S (its
own 1 without momentum). An inactive token (η = 1, α = θ = 0) does not add S to M.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Decays(NamedTuple):
    """As in decay.py, for steps of C places, P = 2 with momentum and else 1, and the rows of M and of S."""

    carry: Tensor  # (steps, C, P)
    response: Tensor  # (steps, C, C)
    last: Tensor  # (steps, C, P)
    keep: Tensor  # (steps, 1 or 3)
    memory: Tensor  # (steps, 1 + C, P + C), first the row before the first token
    momentum: Tensor | None  # the same


@triton.jit
def decay_kernel(
    theta,  # (steps, C)
    eta,  # (steps, C)
    alpha,  # (steps, C)
    active,  # (steps, C), 0 or 1
    memory,  # (steps, 1 + C, PARTS + C), out
    momentum,  # (steps, 1 + C, PARTS + C), out
    carry,  # (steps, C, PARTS), out
    response,  # (steps, C, C), out
    last,  # (steps, C, PARTS), out
    keep,  # (steps, 2 PARTS - 1), out
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # PARTS + C raised to a power of two
    MOMENTUM: tl.constexpr,
):
    PARTS: tl.constexpr = 1 + MOMENTUM
    ROW: tl.constexpr = PARTS + C
    step = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    source = column - PARTS
    is_source = (source >= 0) & (source < C)
    size = tl.load(theta + step * C + source, mask=is_source, other=0.0)
    of_M = tl.where(column == 0, 1.0, 0.0)
    of_S = tl.where(column == 1, 1.0, 0.0)
    row = step * (1 + C) * ROW + column
    tl.store(memory + row, of_M, mask=column < ROW)
    if MOMENTUM:
        tl.store(momentum + row, of_S, mask=column < ROW)
    for t in range(C):
        at = step * C + t
        row += ROW
        added = tl.where(source == t, 1.0, 0.0)
        if MOMENTUM:
            of_S = tl.load(eta + at) * of_S + added
            tl.store(momentum + row, of_S, mask=column < ROW)
            added = tl.load(active + at) * of_S
        of_M = (1 - tl.load(alpha + at)) * of_M + added
        tl.store(memory + row, of_M, mask=column < ROW)
        tl.store(carry + at * PARTS + column, of_M, mask=column < PARTS)
        tl.store(response + at * C + source, of_M * size, mask=is_source)
    tl.store(last + (step * C + source) * PARTS, of_M * size, mask=is_source)
    tl.store(keep + step * (2 * PARTS - 1) + column, of_M, mask=column == 0)
    if MOMENTUM:
        tl.store(last + (step * C + source) * PARTS + 1, of_S * size, mask=is_source)
        tl.store(keep + step * 3 + column, of_S, mask=column == 1)
        tl.store(keep + step * 3 + 1 + column, of_M, mask=column == 1)


@triton.jit
def decay_backward_kernel(
    theta,  # (steps, C)
    eta,  # (steps, C)
    alpha,  # (steps, C)
    active,  # (steps, C)
    memory,  # (steps, 1 + C, PARTS + C)
    momentum,  # (steps, 1 + C, PARTS + C)
    d_carry,  # (steps, C, PARTS)
    d_response,  # (steps, C, C)
    d_last,  # (steps, C, PARTS)
    d_keep,  # (steps, 2 PARTS - 1)
    d_theta,  # (steps, C), out
    d_eta,  # (steps, C), out
    d_alpha,  # (steps, C), out
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    PARTS: tl.constexpr = 1 + MOMENTUM
    ROW: tl.constexpr = PARTS + C
    step = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    source = column - PARTS
    is_source = (source >= 0) & (source < C)
    size = tl.load(theta + step * C + source, mask=is_source, other=0.0)
    row = (step * (1 + C) + C) * ROW + column

    # the last rows: what is owed to `last` and `keep`
    d_size = tl.load(d_last + (step * C + source) * PARTS, mask=is_source, other=0.0)
    d_M = d_size * size + tl.load(d_keep + step * (2 * PARTS - 1) + column, mask=column == 0, other=0.0)
    d_size *= tl.load(memory + row, mask=is_source, other=0.0)
    d_S = tl.zeros((WIDTH,), tl.float32)
    if MOMENTUM:
        d_M += tl.load(d_keep + step * 3 + 1 + column, mask=column == 1, other=0.0)
        d_s = tl.load(d_last + (step * C + source) * PARTS + 1, mask=is_source, other=0.0)
        d_S += d_s * size + tl.load(d_keep + step * 3 + column, mask=column == 1, other=0.0)
        d_size += d_s * tl.load(momentum + row, mask=is_source, other=0.0)

    for back in range(C):
        t = C - 1 - back
        at = step * C + t
        d_mix = tl.load(d_response + at * C + source, mask=is_source & (source <= t), other=0.0)
        d_size += d_mix * tl.load(memory + row, mask=is_source, other=0.0)
        d_M += d_mix * size + tl.load(d_carry + at * PARTS + column, mask=column < PARTS, other=0.0)
        row -= ROW
        before = tl.load(memory + row, mask=column < ROW, other=0.0)
        tl.store(d_alpha + at, -tl.sum(d_M * before))
        if MOMENTUM:
            d_S += tl.load(active + at) * d_M
            before = tl.load(momentum + row, mask=column < ROW, other=0.0)
            tl.store(d_eta + at, tl.sum(d_S * before))
            d_S *= tl.load(eta + at)
        d_M *= 1 - tl.load(alpha + at)
    tl.store(d_theta + step * C + source, d_size, mask=is_source)


def decays(theta: Tensor, eta: Tensor | None, alpha: Tensor, active: Tensor | None) -> Decays:
    """From the gates (steps, C) in float32, contiguous."""
    steps, C = theta.shape
    parts = 1 if eta is None else 2
    memory = theta.new_empty(steps, 1 + C, parts + C)
    carry, response = theta.new_empty(steps, C, parts), theta.new_empty(steps, C, C)
    momentum = None if eta is None else torch.empty_like(memory)
    last, keep = torch.empty_like(carry), theta.new_empty(steps, 2 * parts - 1)
    with torch.cuda.device_of(theta):
        decay_kernel[steps,](
            theta, eta, alpha, active, memory, momentum, carry, response, last, keep, **options(C, parts)
        )
    return Decays(carry, response, last, keep, memory, momentum)


def decays_backward(
    decay: Decays,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    active: Tensor | None,
    d_carry: Tensor,
    d_response: Tensor,
    d_last: Tensor,
    d_keep: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of theta, eta and alpha. What stands in d_response above the diagonal does not matter."""
    d_theta, d_alpha = torch.empty_like(theta), torch.empty_like(alpha)
    d_eta = None if eta is None else torch.empty_like(eta)
    with torch.cuda.device_of(theta):
        decay_backward_kernel[len(theta),](
            theta, eta, alpha, active, decay.memory, decay.momentum, d_carry, d_response, d_last, d_keep,
            d_theta, d_eta, d_alpha, **options(theta.shape[1], 1 if eta is None else 2),
        )  # fmt: skip
    return d_theta, d_eta, d_alpha


def options(chunk_size: int, parts: int) -> dict:
    width = triton.next_power_of_2(parts + chunk_size)
    return {"C": chunk_size, "WIDTH": width, "MOMENTUM": parts - 1, "num_warps": 1}
