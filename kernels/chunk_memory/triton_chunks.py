"""All chunks of N memories at once: what they write and what is read, forward and backward.

Both classes are written to when they are made; then `read`, or `read_backward` and after that `write_backward`. Streams
are (N, T, width); gates and active (steps, C), float32; start (N, P, d_in, d_out), M over S, and anchor (N, d_in,
d_out), float32, one for each layer. layers: what was written. Of the gradients of the layers' states `read_backward`
leaves those after the last chunk open.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_decay import decays, decays_backward
from .triton_deep import write_two_layers
from .triton_deep_backward import write_two_layers_backward
from .triton_layer import Layer
from .triton_read import mix
from .triton_tiles import Layout
from .triton_write import write, write_backward


class OneLayer:
    """Linear memories. No anchors: the first chunk takes its inner gradients at M, as the others do."""

    def __init__(
        self,
        layout: Layout,
        gradient: str,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        eta: Tensor | None,
        alpha: Tensor,
        active: Tensor,
        starts: tuple[Tensor, ...],
        anchors: tuple[Tensor, ...],
    ):
        (start,) = starts
        self.layout, self.gradient, self.k, self.v, self.theta = layout, gradient, k, v, theta
        self.with_anchor = bool(anchors)
        self.anchor = anchors[0] if anchors else start[:, 0].contiguous()
        self.gates = torch.ones_like(theta) if gradient == "token" else theta, eta, alpha, active
        self.decay = decays(*self.gates)
        self.scale = {"chunk": 2, "token": 1, "none": 0}[gradient]
        self.probes, targets = k, v
        if gradient == "token":
            self.probes, targets = solve(k, v, theta, self.decay.carry, self.decay.response)
        w, states = write(layout, k, self.probes, targets, self.decay, start, self.anchor, self.scale)
        self.layers = [Layer(layout, self.decay, k, w, states)]

    def read(self, q: Tensor) -> Tensor:
        """y (N, T, d_v) in q's dtype."""
        return self.layers[0].read(q, q.dtype)

    def read_backward(self, q: Tensor, d_y: Tensor) -> Tensor:
        """The gradient of q; notes what is owed to what was written and to the decays."""
        d_q, self.d_carry, self.d_response = self.layers[0].read_backward(q, d_y)
        return d_q

    def write_backward(self) -> tuple[list[Tensor | None], list[Tensor], list[Tensor]]:
        """Gradients of k, v, theta, eta and alpha; of the starts; of the anchors."""
        (layer,) = self.layers
        d_targets, d_anchor = write_backward(
            self.layout, self.k, self.probes, self.decay, layer.d_w, layer.d_states, self.scale
        )
        d_start, d_keep = layer.d_states[:, 0], layer.keep_backward()
        d_k, d_last = layer.keys_backward()
        d_v, d_step = d_targets, None
        if self.scale:
            layer.states[:, 0, 0] = self.anchor
            d_probes = mix(self.layout, d_targets, None, layer.states, parts=1, flip_states=True)[0].neg_()
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
        d_theta = d_theta if d_step is None else d_step
        d_inputs = [d_k.to(self.k.dtype), d_v.to(self.v.dtype), d_theta, d_eta, d_alpha]
        return d_inputs, [d_start], [d_anchor] if self.with_anchor else []

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


class TwoLayers:
    """Memories gelu(x W1) W2, gradient "chunk"."""

    def __init__(
        self,
        layout: Layout,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        eta: Tensor | None,
        alpha: Tensor,
        active: Tensor,
        starts: tuple[Tensor, ...],
        anchors: tuple[Tensor, ...],
    ):
        self.layout, self.k, self.v, self.anchors = layout, k, v, anchors
        self.gates = theta, eta, alpha, active
        self.decay = decays(*self.gates)
        self.written, states = write_two_layers(layout, k, v, self.decay, starts, anchors)
        keys, w = (k, self.written.a), (self.written.w_1, self.written.w_2)
        self.layers = [Layer(layout, self.decay, *each) for each in zip(keys, w, states)]

    def read(self, q: Tensor) -> Tensor:
        """y (N, T, d_v) in q's dtype."""
        hidden = self.layers[0].read(q, torch.float32)
        return self.layers[1].read(F.gelu(hidden), q.dtype)

    def read_backward(self, q: Tensor, d_y: Tensor) -> Tensor:
        """As in OneLayer."""
        first, second = self.layers
        hidden = first.read(q, torch.float32)
        d_a, *d_second = second.read_backward(F.gelu(hidden), d_y)
        d_q, *d_first = first.read_backward(q, torch.ops.aten.gelu_backward(d_a, hidden))
        self.d_carry, self.d_response = (x + y for x, y in zip(d_first, d_second))
        return d_q

    def write_backward(self) -> tuple[list[Tensor | None], list[Tensor], list[Tensor]]:
        """As in OneLayer."""
        first, second = self.layers
        d_w, d_states = [first.d_w, second.d_w], [first.d_states, second.d_states]
        d_h, d_v, d_anchors = write_two_layers_backward(
            self.layout, self.k, self.decay, self.anchors, self.written, second.states,
            second.reads_to_keys(), d_w, d_states,
        )  # fmt: skip
        d_keep = first.keep_backward() + second.keep_backward()
        d_k, d_last = first.keys_backward()
        d_last += second.last_backward()
        first.states[:, 0, 0] = self.anchors[0]
        d_k += mix(self.layout, d_h, None, first.states, parts=1, flip_states=True)[0]
        d_gates = decays_backward(self.decay, *self.gates, self.d_carry, self.d_response, d_last, d_keep)
        d_inputs = [d_k.to(self.k.dtype), d_v.to(self.v.dtype), *d_gates]
        return d_inputs, [layer.d_states[:, 0] for layer in self.layers], d_anchors


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
