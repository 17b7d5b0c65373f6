"""What the tokens of a chunk write, for each rule: values w such that the step is kᵀ w, and the gradients.

The inner gradient of a linear memory at M is 2 kᵀ (kM − v), so its step is kᵀ w with w = 2 (v − kM). A memory of two
layers, Y = gelu(H) W2 with H = K W1, is two linear memories, with keys K and A = gelu(H):

    w2 = 2 (V − A W2)        w1 = (w2 W2ᵀ) ∘ gelu'(H)

Each class holds a group of g chunks with streams k, v (g, N, K, width) for N = batch × heads and K sources to a chunk,
and the memory's layers. `fill` fills in the layers' w (and k, in the second) for chunk p, once the anchor of the chunk
is known: the M's (N, d_in, d_out). `fill_backward` adds to the layers' gradients and to that of the anchor. `close`
gives the gradients of k, v and, where the values depend on it, theta; it may add to those of the decays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decay import Decays
from .linear import Layer, flat


class Hebbian:
    """gradient "none": w = v."""

    def __init__(self, k: Tensor, v: Tensor, x: list[Tensor], decay: Decays):
        self.layers = [Layer(k, v, x[0], decay)]

    def fill(self, p: int, anchor: list[Tensor]) -> None:
        pass

    def fill_backward(self, p: int, anchor: list[Tensor], d_anchor: list[Tensor]) -> None:
        pass

    def close(self, d_carry: Tensor, d_response: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.layers[0].d_k, self.layers[0].d_w, None


class OneLayer:
    """gradient "chunk" at depth 1: w = 2 (v − kM)."""

    def __init__(self, k: Tensor, v: Tensor, x: list[Tensor], decay: Decays):
        self.k, self.v = k, v
        self.layers = [Layer(k, torch.empty_like(v), x[0], decay)]

    def fill(self, p, anchor):
        torch.baddbmm(self.v[p], self.k[p], anchor[0], beta=2, alpha=-2, out=self.layers[0].w_of[p])

    def fill_backward(self, p, anchor, d_anchor):
        layer = self.layers[0]
        layer.d_k_of[p].baddbmm_(layer.d_w_of[p], anchor[0].mT, alpha=-2)
        d_anchor[0].baddbmm_(self.k[p].mT, layer.d_w_of[p], alpha=-2)

    def close(self, d_carry, d_response):
        return self.layers[0].d_k, self.layers[0].d_w.mul_(2), None


class TwoLayers:
    """gradient "chunk" at depth 2."""

    def __init__(self, k: Tensor, v: Tensor, x: list[Tensor], decay: Decays):
        self.k, self.v = k, v
        hidden = x[0].shape[-1]
        self.h, a, self.error, w1 = (k.new_empty(*k.shape[:3], hidden) for _ in range(4))
        self.layers = [Layer(k, w1, x[0], decay), Layer(a, torch.empty_like(v), x[1], decay)]

    def fill(self, p, anchor):
        first, second = self.layers
        torch.bmm(self.k[p], anchor[0], out=self.h[p])
        gelu(self.h[p], out=second.k_of[p])
        torch.baddbmm(self.v[p], second.k_of[p], anchor[1], beta=2, alpha=-2, out=second.w_of[p])
        torch.bmm(second.w_of[p], anchor[1].mT, out=self.error[p])
        gelu_backward(self.error[p], self.h[p], out=first.w_of[p])

    def fill_backward(self, p, anchor, d_anchor):
        first, second = self.layers
        h, a, w2 = self.h[p], second.k_of[p], second.w_of[p]
        d_w1, d_w2, d_a = first.d_w_of[p], second.d_w_of[p], second.d_k_of[p]
        d_error = gelu_backward(d_w1, h)
        d_w2.baddbmm_(d_error, anchor[1])
        d_anchor[1].baddbmm_(d_error.mT, w2).baddbmm_(a.mT, d_w2, alpha=-2)
        d_a.baddbmm_(d_w2, anchor[1].mT, alpha=-2)
        d_h = gelu_backward(d_a, h, out=d_error)
        d_h += gelu_curvature(h).mul_(d_w1).mul_(self.error[p])
        first.d_k_of[p].baddbmm_(d_h, anchor[0].mT)
        d_anchor[0].baddbmm_(self.k[p].mT, d_h)

    def close(self, d_carry, d_response):
        return self.layers[0].d_k, self.layers[1].d_w.mul_(2), None


class Delta:
    """gradient "token": the step of token t is taken at M̃_t = (1 − α_t) M_{t−1}, after the chunk's earlier tokens.

    With b = 2θ, w_t = b_t (v_t − k_t M̃_t), and k_t M̃_t = β_t k_t M_0 + Σ_{r<t} G[t, r] (k_t k_rᵀ) w_r, so

        T W = b∘V − (b β∘K) M_0,        T = I + b ∘ strictly lower part of (G ∘ KKᵀ)

    and W = V' − K' M_0, with [K' | V'] solved from T [K' | V'] = b∘[β∘K | V] for all chunks at once. The anchor is M_0.
    """

    def __init__(self, k: Tensor, v: Tensor, x: list[Tensor], decay: Decays, theta: Tensor):
        self.k, self.v, self.decay = *flat(k, v), decay
        self.b = 2 * theta[..., None]
        self.gram = torch.bmm(self.k, self.k.mT).tril_(-1)
        self.system = self.b * decay.response * self.gram  # the solver supplies the 1s of the diagonal
        right = self.b * torch.cat((decay.carry * self.k, self.v), -1)
        self.solved = torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)
        self.d_solved = torch.empty_like(self.solved)
        self.group, self.split = k.shape[:2], (k.shape[-1], v.shape[-1])
        self.layers = [Layer(k, torch.empty_like(v), x[0], decay)]

    def columns(self, both: Tensor) -> tuple[Tensor, Tensor]:
        return both.unflatten(0, self.group).split(self.split, -1)

    def fill(self, p, anchor):
        k, v = self.columns(self.solved)
        torch.baddbmm(v[p], k[p], anchor[0], alpha=-1, out=self.layers[0].w_of[p])

    def fill_backward(self, p, anchor, d_anchor):
        k, _ = self.columns(self.solved)
        d_k, d_v = self.columns(self.d_solved)
        d_w = self.layers[0].d_w_of[p]
        d_anchor[0].baddbmm_(k[p].mT, d_w, alpha=-1)
        d_k[p] = torch.bmm(d_w, anchor[0].mT).neg_()
        d_v[p] = d_w

    def close(self, d_carry, d_response):
        b, response, gram = self.b, self.decay.response, self.gram
        d_right = torch.linalg.solve_triangular(self.system.mT, self.d_solved, upper=True, unitriangular=True)
        d_system = torch.bmm(d_right, self.solved.mT).tril_(-1).neg_()
        d_right_k, d_right_v = d_right.split(self.split, -1)
        of_k, of_v = ((d * x).sum(-1, keepdim=True) for d, x in ((d_right_k, self.k), (d_right_v, self.v)))
        d_b = (d_system * response * gram).sum(-1, keepdim=True) + of_k * self.decay.carry + of_v
        d_carry += b * of_k
        d_response += b * d_system * gram
        d_gram = b * d_system * response
        d_k = b * self.decay.carry * d_right_k + torch.bmm(d_gram + d_gram.mT, self.k)
        d_k, d_v = (d.unflatten(0, self.group) for d in (d_k, b * d_right_v))
        return self.layers[0].d_k + d_k, d_v, 2 * d_b[..., 0]


def gelu(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(x, out=out)


def gelu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """grad ∘ gelu'(x)."""
    out = torch.empty_like(grad) if out is None else out
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)


def gelu_curvature(x: Tensor) -> Tensor:
    """gelu''(x) = φ(x) (2 − x²), φ the normal density."""
    square = x * x
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return density.mul_(square.neg_().add_(2))
