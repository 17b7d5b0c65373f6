"""One linear memory through chunks: what is read from it, what is written into it, and the gradients of both.

A layer's state X stacks M over S: (P d_in, d_out), P = 2 with momentum, else 1. Source r writes k_rᵀ w_r. With the
coefficients of `decay.py`, for all tokens of a chunk at once,

    read:   O  = [β∘Q | f∘Q] X + (QKᵀ ∘ G) W
    write:  M' = β_L M + f_L S + (G_L∘K)ᵀ W        S' = m_L S + (s∘K)ᵀ W

Many chunks are read together; they are written one after the other. All tensors are 3-d, first the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import Decays


def read(q: Tensor, k: Tensor, w: Tensor, x: Tensor, decay: Decays) -> Tensor:
    """q (n, L, d_in), k (n, K, d_in), w (n, K, d_out), x (n, P d_in, d_out) before the chunk: (n, L, d_out)."""
    weights = torch.bmm(q, k.mT).mul_(decay.response)
    return torch.bmm(copies(q, decay.carry), x).baddbmm_(weights, w)


def read_backward(grad: Tensor, q: Tensor, k: Tensor, w: Tensor, x: Tensor, decay: Decays, d_x: Tensor):
    """Gradients of q, k, w, decay.carry and decay.response. That of x is written into d_x."""
    scores = torch.bmm(q, k.mT)
    d_w = torch.bmm((scores * decay.response).mT, grad)
    d_weights = torch.bmm(grad, w.mT)
    d_response = scores.mul_(d_weights)
    d_scores = d_weights.mul_(decay.response)
    torch.bmm(copies(q, decay.carry).mT, grad, out=d_x)
    d_q, d_carry = copies_backward(torch.bmm(grad, x.mT), q, decay.carry)
    d_q.baddbmm_(d_scores, k)
    d_k = torch.bmm(d_scores.mT, q)
    return d_q, d_k, d_w, d_carry, d_response


def write(k: Tensor, w: Tensor, x: Tensor, last: Tensor, keep: Tensor, out: Tensor) -> None:
    """The state after a chunk, into `out`: k, w and x as in `read`, last (n, K, P) as in Decays.

    keep: (n, 3), β_L, m_L and f_L; (n, 1), β_L, without momentum.
    """
    old, new = parts(x, last), parts(out, last)
    torch.mul(old, keep[:, : len_parts(last), None, None], out=new)
    if len_parts(last) == 2:
        new[:, 0].addcmul_(old[:, 1], keep[:, 2, None, None])
    out.baddbmm_(copies(k, last).mT, w)


def write_backward(
    grad: Tensor,
    k: Tensor,
    w: Tensor,
    x: Tensor,
    last: Tensor,
    keep: Tensor,
    d_k: Tensor,
    d_w: Tensor,
    d_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds the gradients of k, w and x to d_k, d_w and d_x; returns those of `last` and `keep`."""
    d_w.baddbmm_(copies(k, last), grad)
    d_key, d_last = copies_backward(torch.bmm(w, grad.mT), k, last)
    d_k += d_key
    new, old, d_old = parts(grad, last), parts(x, last), parts(d_x, last)
    d_keep = (new * old).sum((2, 3))
    d_old.addcmul_(new, keep[:, : len_parts(last), None, None])
    if len_parts(last) == 2:
        d_keep = torch.cat((d_keep, (new[:, :1] * old[:, 1:]).sum((2, 3))), 1)
        d_old[:, 1].addcmul_(new[:, 0], keep[:, 2, None, None])
    return d_last, d_keep


def len_parts(coefficients: Tensor) -> int:
    return coefficients.shape[-1]


def parts(x: Tensor, coefficients: Tensor) -> Tensor:
    """(n, P d_in, d_out) as (n, P, d_in, d_out): M and S."""
    return x.unflatten(1, (len_parts(coefficients), -1))


def copies(x: Tensor, coefficients: Tensor) -> Tensor:
    """(n, L, d) times each of the P columns of (n, L, P), side by side: (n, L, P d)."""
    return (x[:, :, None] * coefficients[..., None]).flatten(2)


def copies_backward(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.unflatten(2, (len_parts(coefficients), -1))
    d_coefficients = (grad * x[:, :, None]).sum(-1)
    d_x = grad[:, :, 0] * coefficients[:, :, :1]
    if len_parts(coefficients) == 2:
        d_x.addcmul_(grad[:, :, 1], coefficients[:, :, 1:])
    return d_x, d_coefficients
