"""What the tokens of a chunk write, for each rule: keys k and values w such that the step is kᵀ w, and the gradients.

The inner gradient of a linear memory at M is 2 kᵀ (kM − v), so its step is kᵀ w with w = 2 (v − kM). A memory of two
layers, Y = gelu(H) W2 with H = K W1, is two linear memories, with keys K and A = gelu(H):

    w2 = 2 (V − A W2)        w1 = (w2 W2ᵀ) ∘ gelu'(H)

Each class holds a group of g chunks, tensors (g, N, K, width) for N = batch × heads and K sources to a chunk:
`keys` and `values`, one each for a layer. `write` fills in chunk p once its anchor is known, the M's (N, d_in, d_out).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decay import Decays


class Hebbian:
    """gradient "none": w = v."""

    def __init__(self, k: Tensor, v: Tensor):
        self.keys, self.values = [k], [v]

    def write(self, p: int, anchor: list[Tensor]) -> None:
        pass

    def write_backward(self, p, anchor, d_keys, d_values, d_anchor) -> None:
        pass

    def close(self, d_keys: list[Tensor], d_values: list[Tensor], *_) -> tuple[Tensor, Tensor, None]:
        """Gradients of k, v and theta from those of keys and values, once all chunks are through `write_backward`."""
        return d_keys[0], d_values[0], None


class OneLayer:
    """gradient "chunk" at depth 1: w = 2 (v − kM)."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self.keys, self.values = [k], [torch.empty_like(v)]

    def write(self, p: int, anchor: list[Tensor]) -> None:
        torch.baddbmm(self.v[p], self.k[p], anchor[0], beta=2, alpha=-2, out=self.values[0][p])

    def write_backward(self, p, anchor, d_keys, d_values, d_anchor) -> None:
        """Adds to the gradients of keys (..., of chunk p) and of the anchor what the values owe to them."""
        d_w = d_values[0][p]
        d_keys[0][p].baddbmm_(d_w, anchor[0].mT, alpha=-2)
        d_anchor[0].baddbmm_(self.k[p].mT, d_w, alpha=-2)

    def close(self, d_keys, d_values, *_):
        return d_keys[0], d_values[0].mul_(2), None


class TwoLayers:
    """gradient "chunk" at depth 2."""

    def __init__(self, k: Tensor, v: Tensor, hidden: int):
        self.k, self.v = k, v
        self.h, a, self.back, w1 = (k.new_empty(*k.shape[:3], hidden) for _ in range(4))
        self.keys, self.values = [k, a], [w1, torch.empty_like(v)]

    def write(self, p: int, anchor: list[Tensor]) -> None:
        h, a, back, w2 = self.h[p], self.keys[1][p], self.back[p], self.values[1][p]
        torch.bmm(self.k[p], anchor[0], out=h)
        gelu(h, out=a)
        torch.baddbmm(self.v[p], a, anchor[1], beta=2, alpha=-2, out=w2)
        torch.bmm(w2, anchor[1].mT, out=back)
        gelu_backward(back, h, out=self.values[0][p])

    def write_backward(self, p, anchor, d_keys, d_values, d_anchor) -> None:
        h, a, back, w2 = self.h[p], self.keys[1][p], self.back[p], self.values[1][p]
        d_w1, d_w2 = d_values[0][p], d_values[1][p]
        d_a = d_keys[1][p]
        d_back = gelu_backward(d_w1, h)
        d_w2.baddbmm_(d_back, anchor[1])
        d_anchor[1].baddbmm_(d_back.mT, w2)
        d_a.baddbmm_(d_w2, anchor[1].mT, alpha=-2)
        d_anchor[1].baddbmm_(a.mT, d_w2, alpha=-2)
        d_h = gelu_backward(d_a, h).add_(gelu_curvature(h).mul_(d_w1).mul_(back))
        d_keys[0][p].baddbmm_(d_h, anchor[0].mT)
        d_anchor[0].baddbmm_(self.k[p].mT, d_h)

    def close(self, d_keys, d_values, *_):
        return d_keys[0], d_values[1].mul_(2), None


class Delta:
    """gradient "token": the step of token t is taken at M̃_t = (1 − α_t) M_{t−1}, after the chunk's earlier tokens.

    With b = 2θ, w_t = b_t (v_t − k_t M̃_t), and k_t M̃_t = β_t k_t M_0 + Σ_{r<t} G[t, r] (k_t k_rᵀ) w_r, so

        T W = b∘V − (b β∘K) M_0,        T = I + b ∘ strictly lower part of (G ∘ KKᵀ)

    and W = V' − K' M_0 with V' and K' solved from T for all chunks at once. M_0 is the chunk's first memory.
    """

    def __init__(self, k: Tensor, v: Tensor, theta: Tensor, decay: Decays):
        self.k, self.v, self.decay = k, v, decay
        self.b = 2 * theta[..., None]
        flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
        self.gram = torch.bmm(flat_k, flat_k.mT).tril_(-1)
        self.system = (
            self.b * decay.response * self.gram
        )  # less the 1s of the diagonal, which the solver supplies
        right = self.b * torch.cat((decay.carry * flat_k, flat_v), -1)
        self.solved = torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)
        solved_k, solved_v = self.solved.split((k.shape[-1], v.shape[-1]), -1)
        self.solved_k, self.solved_v = solved_k.view_as(k), solved_v.view_as(v)
        self.keys, self.values = [k], [torch.empty_like(v)]
        self.d_solved = torch.empty_like(self.solved)

    def write(self, p: int, anchor: list[Tensor]) -> None:
        torch.baddbmm(self.solved_v[p], self.solved_k[p], anchor[0], alpha=-1, out=self.values[0][p])

    def write_backward(self, p, anchor, d_keys, d_values, d_anchor) -> None:
        d_anchor[0].baddbmm_(self.solved_k[p].mT, d_values[0][p], alpha=-1)
        d_solved = self.d_solved.view(*self.k.shape[:3], -1)[p]
        d_solved[..., : self.k.shape[-1]] = torch.bmm(d_values[0][p], anchor[0].mT).neg_()
        d_solved[..., self.k.shape[-1] :] = d_values[0][p]

    def close(self, d_keys, d_values, d_carry: Tensor, d_response: Tensor):
        k, v, b, decay = self.k.flatten(0, 1), self.v.flatten(0, 1), self.b, self.decay
        d_right = torch.linalg.solve_triangular(self.system.mT, self.d_solved, upper=True, unitriangular=True)
        d_system = torch.bmm(d_right, self.solved.mT).tril_(-1).neg_()
        d_right_k, d_right_v = d_right.split((k.shape[-1], v.shape[-1]), -1)
        d_b = (d_system * decay.response * self.gram).sum(-1, keepdim=True)
        d_b += (d_right_k * k).sum(-1, keepdim=True) * decay.carry + (d_right_v * v).sum(-1, keepdim=True)
        d_carry += b * (d_right_k * k).sum(-1, keepdim=True)
        d_response += d_system * b * self.gram
        d_gram = d_system * b * decay.response
        d_k = d_keys[0].flatten(0, 1)
        d_k += b * decay.carry * d_right_k + torch.bmm(d_gram, k) + torch.bmm(d_gram.mT, k)
        return d_keys[0], (b * d_right_v).view_as(self.v), 2 * d_b[..., 0]


def gelu(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(x, out=out)


def gelu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """grad ∘ gelu'(x)."""
    if out is None:
        out = torch.empty_like(grad)
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)


def gelu_curvature(x: Tensor) -> Tensor:
    """gelu''(x) = φ(x) (2 − x²), φ the normal density."""
    square = x * x
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return density.mul_(square.neg_().add_(2))
