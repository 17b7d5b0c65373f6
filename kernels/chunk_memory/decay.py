"""How much of each token's write the memory holds at each later token: the decays of n chunks, and their gradients.

Let U_r be what token r of a chunk writes at step size 1 (it writes θ_r U_r), M_0 and S_0 the state before the chunk.
Then M_t and S_t are combinations of M_0, S_0, U_1, ..., U_L, and the rows of their coefficients follow the recurrences
of the memory itself,

    S_t = η_t S_{t−1} + U_t            M_t = (1 − α_t) M_{t−1} + S_t

(without momentum S_t = U_t and there is no S_0). Multiplied by θ where it belongs this is

    M_t = β_t M_0 + f_t S_0 + Σ_r G[t, r] U_r          S_L = m_L S_0 + Σ_r s_r U_r

No quotients and no logarithms, so gates of exactly 0 or 1 are like any others. Rows are computed for all chunks at
once and stored by token: (L, n, P + L), P = 2 with momentum and else 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """For n chunks of L tokens and K sources: the tokens, and before them those in the window of the first.

    carry: (n, L, P), what M_t keeps of M_0 and of S_0: β and f.
    response: (n, L, K), G: what M_t has of each source. Zero where the source comes after t.
    last: (n, K, P), what M_L and S_L have of each source: the last row of G, and s.
    keep: (n, 3), β_L, m_L and f_L, what the state after the chunk keeps; (n, 1), β_L, without momentum.
    saved: what the backward pass needs.
    """

    carry: Tensor
    response: Tensor
    last: Tensor
    keep: Tensor
    saved: tuple


def decays(
    theta: Tensor | None, eta: Tensor | None, alpha: Tensor, active: Tensor | None, window: int
) -> Decays:
    """From the gates (n, L). theta None: 1. active (n, L), 0 or 1: an inactive token does not add S to M.

    With a window w each source counts in the steps of w tokens, its own and the w − 1 after it.
    """
    retain = by_token(1 - alpha)
    parts = 1 if eta is None else 2
    own = retain.new_zeros(len(retain), retain.shape[1], parts + len(retain))
    own[:, :, parts:].diagonal(dim1=0, dim2=2).fill_(1)  # the U_t in S_t
    momentum, added = None, own
    if eta is not None:
        momentum = run_on(own, by_token(eta), start=1)
        added = momentum if active is None else momentum * by_token(active)
    memory = run_on(added, retain, start=0)
    mix = memory[:, :, parts:]
    response = mix if theta is None else mix * theta
    band = None
    if window > 1:
        band = in_window(len(retain), window, retain)
        response = response @ band
    last, keep = response[-1, :, :, None], memory[-1, :, :1]
    if momentum is not None:
        s = momentum[-1, :, 2:] * theta
        last = torch.stack((response[-1], s if band is None else s @ band), -1)
        keep = torch.cat((keep, momentum[-1, :, 1:2], memory[-1, :, 1:2]), 1)
    carry = memory[:, :, :parts].transpose(0, 1)
    return Decays(
        carry, response.transpose(0, 1), last, keep, (theta, eta, alpha, active, memory, momentum, band)
    )


def decays_backward(
    decay: Decays, d_carry: Tensor, d_response: Tensor, d_last: Tensor, d_keep: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients (n, L) of theta (None if it was None), eta (None without momentum) and alpha.

    What stands in d_response above the diagonal does not matter.
    """
    theta, eta, alpha, active, memory, momentum, band = decay.saved
    parts = d_carry.shape[2]
    d_s = None if momentum is None else d_last[:, :, 1]
    d_response = d_response.transpose(0, 1).contiguous()
    d_response[-1] += d_last[:, :, 0]
    if band is not None:
        d_response = d_response @ band.T
        d_s = None if momentum is None else d_s @ band.T
    d_theta = None
    d_memory = torch.empty_like(memory)
    d_memory[:, :, :parts] = d_carry.transpose(0, 1)
    d_memory[-1, :, 0] += d_keep[:, 0]
    if theta is None:
        d_memory[:, :, 1:] = d_response
    else:
        d_theta = (d_response * memory[:, :, parts:]).sum(0)
        torch.mul(d_response, theta, out=d_memory[:, :, parts:])
    if momentum is None:
        return d_theta, None, run_on_backward(d_memory, memory, by_token(1 - alpha), 0).neg_()
    d_memory[-1, :, 1] += d_keep[:, 2]
    d_retain = run_on_backward(d_memory, memory, by_token(1 - alpha), 0)
    d_momentum = d_memory if active is None else d_memory * by_token(active)
    d_theta += d_s * momentum[-1, :, 2:]
    d_momentum[-1, :, 2:].addcmul_(d_s, theta)
    d_momentum[-1, :, 1] += d_keep[:, 1]
    return d_theta, run_on_backward(d_momentum, momentum, by_token(eta), 1), d_retain.neg_()


def by_token(gate: Tensor) -> Tensor:
    """(n, L) to (L, n, 1)."""
    return gate.T.contiguous()[..., None]


def run_on(added: Tensor, factor: Tensor, start: int) -> Tensor:
    """The rows row_t = factor_t row_{t−1} + added_t; row_0 is 1 in column `start`. added: (L, n, W)."""
    rows = torch.empty_like(added)
    rows[0] = added[0]
    rows[0, :, start] += factor[0, :, 0]
    steps = list(zip(added.unbind(), factor.unbind(), rows.unbind()))
    for (_, _, before), (new, by, row) in pairwise(steps):
        torch.addcmul(new, before, by, out=row)
    return rows


def run_on_backward(grad: Tensor, rows: Tensor, factor: Tensor, start: int) -> Tensor:
    """The gradient (n, L) of `factor` from that of the rows, which is overwritten by that of `added`."""
    steps = list(zip(grad.unbind(), factor.unbind()))
    for (after, by), (row, _) in pairwise(reversed(steps)):
        row.addcmul_(after, by)
    d_factor = torch.empty_like(factor[..., 0])
    d_factor[0] = grad[0, :, start]
    torch.sum(grad[1:] * rows[:-1], -1, out=d_factor[1:])
    return d_factor.T


def in_window(length: int, window: int, like: Tensor) -> Tensor:
    """(L, L + w − 1) of 0 and 1: whether source i is in the window of token t; source 0 is token −(w − 1)."""
    ones = like.new_ones(length, length + window - 1)
    return ones.triu() - ones.triu(window)
