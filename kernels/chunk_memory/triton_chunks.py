"""All chunks of N linear memories at once: what they write and what is read, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_decay import decays, decays_backward
from .triton_read import mix, outer, response_gradient
from .triton_tiles import Layout
from .triton_write import write, write_backward


class Chunks:
    """Written to when it is made; then `read`, or `read_backward` and after that `write_backward`.

    Streams are (N, T, width); gates and active (steps, C), float32; start (N, P, d, d_v), M over S, and anchor
    (N, d, d_v), float32; anchor None: the first chunk takes its inner gradients at M, as the others do.

    states: (N, n_chunks + 1, P, d, d_v), before each chunk and after the last. d_states: their gradients, of which
    `read_backward` leaves those after the last chunk open.
    """

    def __init__(self, layout: Layout, gradient: str, k, v, theta, eta, alpha, active, start, anchor):
        self.layout, self.gradient, self.k, self.v, self.theta = layout, gradient, k, v, theta
        self.parts, self.with_anchor = start.shape[1], anchor is not None
        self.anchor = anchor if self.with_anchor else start[:, 0].contiguous()
        self.gates = torch.ones_like(theta) if gradient == "token" else theta, eta, alpha, active
        self.decay = decays(*self.gates)
        self.scale = {"chunk": 2, "token": 1, "none": 0}[gradient]
        self.probes, targets = k, v
        if gradient == "token":
            self.probes, targets = solve(k, v, theta, self.decay.carry, self.decay.response)
        self.w, self.states = write(
            layout, k, self.probes, targets, self.decay, start, self.anchor, self.scale
        )

    def read(self, q: Tensor) -> Tensor:
        """y (N, T, d_v) in q's dtype."""
        pairs, carry = (self.k, self.w, self.decay.response), self.decay.carry
        return mix(self.layout, q, pairs, self.states, carry, parts=self.parts, dtype=q.dtype)[0]

    def read_backward(self, q: Tensor, d_y: Tensor) -> Tensor:
        """The gradient of q; notes what is owed to w, to the states before the chunks and to the decays."""
        layout, response, carry = self.layout, self.decay.response, self.decay.carry
        self.q, self.d_y = q, d_y
        self.d_w, _ = mix(layout, self.k, (q, d_y, response), flip_response=True)
        self.d_response = response_gradient(layout, q, self.k, d_y, self.w)
        self.d_states = outer(layout, q, carry, d_y)
        d_q, self.d_carry = mix(
            layout, d_y, (self.w, self.k, response), self.states, carry,
            parts=self.parts, flip_states=True, other=q, dtype=q.dtype,
        )  # fmt: skip
        return d_q

    def write_backward(self) -> tuple[Tensor | None, ...]:
        """Gradients of k, v, theta, eta, alpha, start and anchor."""
        layout, response, last = self.layout, self.decay.response, self.decay.last
        d_targets, d_anchor = write_backward(
            layout, self.k, self.probes, self.decay, self.d_w, self.d_states, self.scale
        )
        d_start, d_after = self.d_states[:, 0], self.d_states[:, 1:]
        d_keep = keep_gradient(self.states[:, :-1], d_after)
        d_k, d_last = mix(  # what reads and writes owe to the keys
            layout, self.w, (self.d_y, self.q, response), d_after, last,
            parts=self.parts, flip_states=True, flip_response=True, other=self.k,
        )  # fmt: skip
        d_v, d_step = d_targets, None
        if self.scale:
            self.states[:, 0, 0] = self.anchor
            d_probes = mix(layout, d_targets, None, self.states, parts=1, flip_states=True)[0].neg_()
            if self.gradient == "token":
                of_keys, d_v, d_step = self.solve_backward(d_probes, d_targets)
                d_k += of_keys
            else:
                d_k += d_probes
            if not self.with_anchor:
                d_start[:, 0] += d_anchor
        d_theta, d_eta, d_alpha = decays_backward(
            self.decay, *self.gates, self.d_carry, self.d_response, d_last, d_keep
        )
        d_streams = d_k.to(self.k.dtype), d_v.to(self.v.dtype)
        d_theta = d_theta if d_step is None else d_step
        return *d_streams, d_theta, d_eta, d_alpha, d_start, d_anchor if self.with_anchor else None

    def solve_backward(self, d_probes: Tensor, d_targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of k, v and theta; adds to those of the decays."""
        inputs = self.k.float(), self.v.float(), self.theta, self.decay.carry, self.decay.response
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in inputs]
            solved = solve(*inputs)
        d_k, d_v, d_theta, d_carry, d_response = torch.autograd.grad(solved, inputs, (d_probes, d_targets))
        self.d_carry += d_carry
        self.d_response += d_response
        return d_k, d_v, d_theta


def solve(k: Tensor, v: Tensor, theta: Tensor, carry: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient "token": K' and V', float32, such that what the tokens of a chunk write is W = V' − K' M_0.

    The step of token t is taken at M̃_t = (1 − α_t) M_{t−1}, after the chunk's earlier tokens: with b = 2θ

        w_t = b_t (v_t − k_t M̃_t)        k_t M̃_t = β_t k_t M_0 + Σ_{r<t} G[t, r] (k_t k_rᵀ) w_r

    so (I + b ∘ lower(G ∘ KKᵀ)) [K' | V'] = b ∘ [β∘K | V]. k, v: (N, n_chunks C, width).
    """
    shape, (d, d_v) = k.shape[:2], (k.shape[2], v.shape[2])
    k, v = (x.float().reshape(*theta.shape, -1) for x in (k, v))
    step = 2 * theta[..., None]
    system = step * response * (k @ k.mT).tril(-1)  # the solver supplies the 1s of the diagonal
    right = step * torch.cat((carry * k, v), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return tuple(x.reshape(*shape, -1).contiguous() for x in solved.split((d, d_v), -1))


def keep_gradient(states: Tensor, d_after: Tensor) -> Tensor:
    """(steps, 3): of β, m and f, or (steps, 1): of β. states before, gradients after: (N, n_chunks, P, d, d_v)."""
    own = (d_after * states).sum((-1, -2)).flatten(0, 1)
    if own.shape[1] == 1:
        return own
    pushed = (d_after[:, :, 0] * states[:, :, 1]).sum((-1, -2)).view(-1, 1)
    return torch.cat((own, pushed), 1)
