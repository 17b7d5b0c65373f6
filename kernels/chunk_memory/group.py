"""Some chunks in a row, computed together from the state before them; and their gradients, computed backwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .decay import decays, decays_backward
from .sources import Delta, Hebbian, OneLayer, TwoLayers, gelu, gelu_backward


class Rule(NamedTuple):
    gradient: str
    window: int
    depth: int


class Group:
    """g chunks of L tokens, for N = batch × heads memories.

    q: (g, N, L, d); k, v: (g, N, K, width), the sources, K = L + window − 1; gates and active: (g, N, L).
    states: for each layer M over S before the first chunk, (N, P d_in, d_out), or before each chunk and after the last,
        (g + 1, N, P d_in, d_out), where an earlier pass kept them.
    anchors: where the first chunk takes its inner gradients, (N, d_in, d_out) each; empty: at its M, as the others do.

    Call `write` first, then `read` or `backward`.
    """

    def __init__(self, rule: Rule, q, k, v, theta, eta, alpha, active, states, anchors):
        self.q, self.anchors, self.n_chunks = q.flatten(0, 1), anchors, len(q)
        theta, eta, alpha, active = (
            None if gate is None else gate.flatten(0, 1) for gate in (theta, eta, alpha, active)
        )
        self.decay = decays(None if rule.gradient == "token" else theta, eta, alpha, active, rule.window)
        self.written = states[0].dim() == 4
        x = states if self.written else [start_at(state, len(q)) for state in states]
        if rule.gradient == "none":
            self.sources = Hebbian(k, v, x, self.decay)
        elif rule.gradient == "token":
            self.sources = Delta(k, v, x, self.decay, theta)
        else:
            self.sources = (OneLayer if rule.depth == 1 else TwoLayers)(k, v, x, self.decay)
        self.layers = self.sources.layers

    def anchor(self, p: int) -> list[Tensor]:
        return self.anchors if p == 0 and self.anchors else [layer.m(layer.x_of[p]) for layer in self.layers]

    def write(self, to_the_end: bool) -> None:
        """Chunk after chunk: what the tokens write, and the states, that after the last chunk only if it is wanted."""
        for p in range(self.n_chunks):
            self.sources.fill(p, self.anchor(p))
            for layer in self.layers:
                layer.copy(p)
                if not self.written and (to_the_end or p + 1 < self.n_chunks):
                    layer.write(p)

    def read(self) -> Tensor:
        """y: (g, N, L, d_v)."""
        y = self.layers[0].read(self.q)
        if len(self.layers) == 2:
            y = self.layers[1].read(gelu(y, out=y))
        return y.unflatten(0, self.layers[0].group)

    def move_anchors(self, anchors: list[Tensor], reached: Tensor) -> list[Tensor]:
        """The anchors after the last chunk: in rows that `reached` (g, N, 1, 1) the end of a chunk, their M there."""
        for p in range(self.n_chunks):
            after = [layer.m(layer.x_of[p + 1]) for layer in self.layers]
            anchors = [torch.where(reached[p], new, old) for new, old in zip(after, anchors)]
        return anchors

    def backward(self, grad: Tensor, d_end: list[Tensor], d_kept: list[Tensor], reached: Tensor | None):
        """From the gradients of y, of the states after the last chunk and (if `reached` is given) of the anchors there,
        those of what the group was given: (q, k, v, theta, eta, alpha), states, anchors.

        d_kept is overwritten with what goes to the anchors as they were before the group.
        """
        d_q, d_carry, d_response = self.read_backward(grad.flatten(0, 1), d_end)
        d_anchors = [torch.zeros_like(anchor) for anchor in self.anchors]
        for p in reversed(range(self.n_chunks)):
            if reached is not None:
                for layer, d_anchor in zip(self.layers, d_kept):
                    layer.m(layer.d_x_of[p + 1]).add_(d_anchor * reached[p])
                    d_anchor *= ~reached[p]
            for layer in self.layers:
                layer.write_backward(p)
            of_chunk = [layer.m(layer.d_x_of[p]) for layer in self.layers]
            self.sources.fill_backward(p, self.anchor(p), d_anchors if p == 0 and d_anchors else of_chunk)
        d_k, d_v, d_step = self.sources.close(d_carry, d_response)
        d_last, d_keep = (sum(d) for d in zip(*(layer.decays_backward() for layer in self.layers)))
        d_theta, *d_gates = decays_backward(self.decay, d_carry, d_response, d_last, d_keep)
        d_gates = [d_step if d_theta is None else d_theta, *d_gates]
        shape = self.layers[0].group
        d_q, *d_gates = (None if d is None else d.unflatten(0, shape) for d in (d_q, *d_gates))
        return (d_q, d_k, d_v, *d_gates), [layer.d_x[0] for layer in self.layers], d_anchors

    def read_backward(self, grad: Tensor, d_end: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, decay.carry and decay.response."""
        first = self.layers[0]
        if len(self.layers) == 1:
            return first.read_backward(self.q, grad, d_end[0])
        hidden = first.read(self.q)
        d_a, d_carry, d_response = self.layers[1].read_backward(
            gelu(hidden, out=torch.empty_like(hidden)), grad, d_end[1]
        )
        d_q, *d_decays = first.read_backward(self.q, gelu_backward(d_a, hidden, out=d_a), d_end[0])
        return d_q, d_carry.add_(d_decays[0]), d_response.add_(d_decays[1])


def start_at(state: Tensor, n_chunks: int) -> Tensor:
    x = state.new_empty(n_chunks + 1, *state.shape)
    x[0] = state
    return x
