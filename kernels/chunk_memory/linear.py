"""One linear memory through a group of chunks: what is read from it, what is written into it, and the gradients.

Its state X stacks M over S: (P d_in, d_out), P = 2 with momentum and else 1. Source r writes k_rᵀ w_r. With the
coefficients of `decay.py`, for all tokens of a chunk at once,

    read:   O  = [β∘Q | f∘Q] X + (QKᵀ ∘ G) W
    write:  M' = β_L M + f_L S + (G_L∘K)ᵀ W        S' = m_L S + (s∘K)ᵀ W

Chunks are written one after the other; all are read together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import Decays


class Layer:
    """g chunks of N memories, with K sources to a chunk.

    k: (g, N, K, d_in), w: (g, N, K, d_out), what the sources write; x: (g + 1, N, P d_in, d_out), the state before each
    chunk and after the last. A chunk's k and w have to be there for `write`, and x[0]; `write` does the rest of x.
    The gradients d_k, d_w and d_x come from `read_backward`; `write_backward` adds to them.
    """

    def __init__(self, k: Tensor, w: Tensor, x: Tensor, decay: Decays):
        self.k, self.w, self.x, self.decay = k, w, x, decay
        self.group, self.parts = k.shape[:2], decay.last.shape[2]
        self.k_copies = k.new_empty(*k.shape[:3], self.parts * k.shape[3])
        last = decay.last.unflatten(0, self.group)
        keep = decay.keep.unflatten(0, self.group)[..., None, None]
        # What the loops over chunks need, as lists of views: making a view costs as much as a small product.
        self.k_of, self.w_of, self.copies_of = k.unbind(), w.unbind(), self.k_copies.unbind()
        self.last_of = last[..., None].unbind()
        self.keep_of, self.cross_of = keep[:, :, : self.parts].unbind(), keep[:, :, -1].unbind()
        self.x_of, self.x_parts = x.unbind(), x.unflatten(2, (self.parts, -1)).unbind()

    def m(self, x: Tensor) -> Tensor:
        """M, the upper part of a state (or of its gradient)."""
        return x[:, : self.k.shape[3]]

    def read(self, q: Tensor) -> Tensor:
        """q (g N, L, d_in) to (g N, L, d_out). After all writes."""
        k, w, x = flat(self.k, self.w, self.x[:-1])
        weights = torch.bmm(q, k.mT).mul_(self.decay.response)
        return torch.bmm(copies(q, self.decay.carry), x).baddbmm_(weights, w)

    def read_backward(self, q: Tensor, grad: Tensor, d_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, decay.carry and decay.response; sets d_k, d_w and d_x. d_end: that of the last state."""
        k, w, x = flat(self.k, self.w, self.x[:-1])
        scores = torch.bmm(q, k.mT)
        d_w = torch.bmm((scores * self.decay.response).mT, grad)
        d_weights = torch.bmm(grad, w.mT)
        d_response = scores.mul_(d_weights)
        d_scores = d_weights.mul_(self.decay.response)
        d_k = torch.bmm(d_scores.mT, q)
        d_q, d_carry = copies_backward(torch.bmm(grad, x.mT), q, self.decay.carry)
        d_q.baddbmm_(d_scores, k)
        self.d_k, self.d_w = (each.unflatten(0, self.group) for each in (d_k, d_w))
        self.d_x = torch.empty_like(self.x)
        self.d_x[-1] = d_end
        torch.bmm(copies(q, self.decay.carry).mT, grad, out=self.d_x[:-1].flatten(0, 1))
        self.d_k_of, self.d_w_of, self.d_x_of = self.d_k.unbind(), self.d_w.unbind(), self.d_x.unbind()
        self.d_x_parts = self.d_x.unflatten(2, (self.parts, -1)).unbind()
        return d_q, d_carry, d_response

    def write(self, p: int) -> None:
        """x[p + 1] from x[p], after `copy`."""
        before, after = self.x_parts[p], self.x_parts[p + 1]
        torch.mul(before, self.keep_of[p], out=after)
        if self.parts == 2:
            after[:, 0].addcmul_(before[:, 1], self.cross_of[p])
        self.x_of[p + 1].baddbmm_(self.copies_of[p].mT, self.w_of[p])

    def copy(self, p: int) -> None:
        """Chunk p's [G_L∘K | s∘K], (N, K, P d_in), from its keys."""
        copies = self.copies_of[p]
        torch.mul(
            self.k_of[p][:, :, None], self.last_of[p], out=copies.view(*copies.shape[:2], self.parts, -1)
        )

    def write_backward(self, p: int) -> None:
        """Adds to d_x[p], d_k[p] and d_w[p] what they owe to d_x[p + 1], after `copy`. Decays: `decays_backward`."""
        before, after = self.d_x_parts[p], self.d_x_parts[p + 1]
        before.addcmul_(after, self.keep_of[p])
        if self.parts == 2:
            before[:, 1].addcmul_(after[:, 0], self.cross_of[p])
        copies, d_after = self.copies_of[p], self.d_x_of[p + 1]
        self.d_w_of[p].baddbmm_(copies, d_after)
        d_copies = torch.bmm(self.w_of[p], d_after.mT, out=copies)  # the copies have done their work
        for d_k, last in zip(d_copies.chunk(self.parts, 2), self.last_of[p].unbind(2)):
            self.d_k_of[p].addcmul_(d_k, last)

    def decays_backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of decay.last and decay.keep, after all of `write_backward`."""
        d_copies = self.k_copies.unflatten(3, (self.parts, -1))
        d_last = (d_copies * self.k[:, :, :, None]).sum(-1)
        after, before = (x.unflatten(2, (self.parts, -1)) for x in (self.d_x[1:], self.x[:-1]))
        d_keep = (after * before).sum((3, 4))
        if self.parts == 2:
            f = (after[:, :, 0] * before[:, :, 1]).sum((2, 3))
            d_keep = torch.cat((d_keep, f[..., None]), 2)
        return d_last.flatten(0, 1), d_keep.flatten(0, 1)


def flat(*tensors: Tensor) -> list[Tensor]:
    """(g, N, ...) as (g N, ...)."""
    return [x.flatten(0, 1) for x in tensors]


def copies(x: Tensor, coefficients: Tensor) -> Tensor:
    """(n, L, d) times each of the P columns of (n, L, P), side by side: (n, L, P d)."""
    return (x[:, :, None] * coefficients[..., None]).flatten(2)


def copies_backward(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.unflatten(2, (coefficients.shape[2], -1))
    d_coefficients = (grad * x[:, :, None]).sum(-1)
    d_x = grad[:, :, 0] * coefficients[:, :, :1]
    if coefficients.shape[2] == 2:
        d_x.addcmul_(grad[:, :, 1], coefficients[:, :, 1:])
    return d_x, d_coefficients
