"""How far a token's write has faded and spread by a later token: the decays of n chunks at once, and their gradients.

With S_t = η_t S_{t−1} + U_t and M_t = (1 − α_t) M_{t−1} + S_t, where U_r is what token r of the chunk writes at step
size 1 (times θ_r), M_0 and S_0 the state before the chunk and t = 1..L,

    M_t = β_t M_0 + f_t S_0 + Σ_r G[t, r] U_r               S_L = m_L S_0 + Σ_r s_r U_r
    D_x[t, i] = x_{i+1} ⋯ x_t for i ≤ t, 0 for i > t        (rows t = 1..L, columns i = 0..L; 0 is the start)
    β = D_{1−α}[:, 0],   [f | G/θ] = D_{1−α}[:, 1:] D_η,   [m_L | s/θ] = last row of D_η

Without momentum G/θ = D_{1−α}[:, 1:]. Products, never quotients or logarithms: 0 and 1 are gates like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """For n chunks of L tokens; P = 2 with momentum, else 1; K sources: the tokens, before them those of the window.

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
    fade = products(1 - alpha)
    if eta is None:
        spread, mix, carry = None, fade[:, :, 1:], fade[:, :, :1]
    else:
        spread = products(eta)
        left = fade[:, :, 1:] if active is None else fade[:, :, 1:] * active[:, None]
        both = left @ spread
        mix, carry = both[:, :, 1:], torch.stack((fade[:, :, 0], both[:, :, 0]), -1)
    response = mix if theta is None else mix * theta[:, None]
    band = None
    if window > 1:
        band = in_window(theta.shape[1], window, theta)
        response = response @ band
    last, keep = response[:, -1, :, None], carry[:, -1]
    if spread is not None:
        s = spread[:, -1, 1:] * theta
        s = s if band is None else s @ band
        last = torch.stack((response[:, -1], s), -1)
        keep = torch.stack((keep[:, 0], spread[:, -1, 0], keep[:, 1]), -1)
    return Decays(carry, response, last, keep, (theta, active, fade, spread, mix, band))


def decays_backward(
    decay: Decays, d_carry: Tensor, d_response: Tensor, d_last: Tensor, d_keep: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of theta (None if it was None), eta (None without momentum) and alpha.

    Overwrites d_response and d_carry; what stands in d_response above the diagonal does not matter.
    """
    theta, active, fade, spread, mix, band = decay.saved
    d_response[:, -1] += d_last[:, :, 0]
    d_carry[:, -1] += d_keep[:, ::2]
    d_s = None if spread is None else d_last[:, :, 1]
    if band is not None:
        d_response = d_response @ band.T
        d_s = None if d_s is None else d_s @ band.T
    d_theta, d_eta, d_mix = None, None, d_response
    if theta is not None:
        d_theta = (d_response * mix).sum(1)
        d_mix = d_response * theta[:, None]
    d_fade = torch.cat((d_carry[:, :, :1], d_mix), -1)
    if spread is not None:
        d_theta += d_s * spread[:, -1, 1:]
        left = fade[:, :, 1:] if active is None else fade[:, :, 1:] * active[:, None]
        d_both = torch.cat((d_carry[:, :, 1:], d_mix), -1)
        d_spread = left.mT @ d_both
        d_spread[:, -1, 1:].addcmul_(d_s, theta)
        d_spread[:, -1, 0] += d_keep[:, 1]
        d_eta = products_backward(spread, d_spread)
        d_left = d_both @ spread.mT
        d_fade[:, :, 1:] = d_left if active is None else d_left * active[:, None]
    return d_theta, d_eta, -products_backward(fade, d_fade)


def products(x: Tensor) -> Tensor:
    """D_x: (n, L) to (n, L, L + 1)."""
    length = x.shape[1]
    before = x.new_ones(length, length + 1, dtype=torch.bool).tril()  # i < t: the factor x_t is in
    return torch.where(before, x[:, :, None], 1).cumprod(1).tril_(1)


def products_backward(d: Tensor, grad: Tensor) -> Tensor:
    """The gradient (n, L) of x from that of D_x: x_t is a factor of D[s, i] for i < t ≤ s, beside D[s, t] D[t − 1, i].

    The row before the first is (1, 0, ..., 0).
    """
    later = d[:, :, 1:].mT @ grad
    out = torch.empty_like(d[:, :, 0])
    out[:, 0] = later[:, 0, 0]
    torch.sum(later[:, 1:] * d[:, :-1], -1, out=out[:, 1:])
    return out


def in_window(length: int, window: int, like: Tensor) -> Tensor:
    """(L, L + w − 1) of 0 and 1: whether source i is in the window of token t; source 0 is token −(w − 1)."""
    ones = like.new_ones(length, length + window - 1)
    return ones.triu() - ones.triu(window)
