"""Some chunks in a row, computed together from the state before them; and their gradients, computed backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import linear
from .decay import decays, decays_backward
from .sources import Delta, Hebbian, OneLayer, TwoLayers, gelu, gelu_backward


@dataclass(frozen=True)
class Rule:
    gradient: str
    window: int
    hidden: int | None  # width between the two layers; None at depth 1


class Group:
    """g chunks of L tokens, for N = batch × heads memories.

    q: (g, N, L, d); k, v: (g, N, K, width), the sources, K = L + window − 1; gates and active: (g, N, L).
    states: before the first chunk, for each layer M over S, (N, P d_in, d_out).
    anchors: where the first chunk takes its inner gradients, (N, d_in, d_out) each; empty: at its M, as the others do.

    Call `write` first, then `read` or `backward`.
    """

    def __init__(self, rule: Rule, q, k, v, theta, eta, alpha, active, states, anchors):
        self.q, self.anchors, self.shape = q, anchors, q.shape[:2]
        theta, eta, alpha, active = (
            None if gate is None else gate.flatten(0, 1) for gate in (theta, eta, alpha, active)
        )
        self.decay = decays(None if rule.gradient == "token" else theta, eta, alpha, active, rule.window)
        if rule.gradient == "none":
            self.sources = Hebbian(k, v)
        elif rule.gradient == "token":
            self.sources = Delta(k, v, theta, self.decay)
        elif rule.hidden is None:
            self.sources = OneLayer(k, v)
        else:
            self.sources = TwoLayers(k, v, rule.hidden)
        self.last, self.keep = self.chunks(self.decay.last), self.chunks(self.decay.keep)
        self.x = [start.new_empty(len(q), *start.shape) for start in states]
        for x, start in zip(self.x, states):
            x[0] = start

    def chunks(self, flat: Tensor) -> Tensor:
        """(g N, ...) as (g, N, ...)."""
        return flat.unflatten(0, self.shape)

    def memories(self, states: list[Tensor]) -> list[Tensor]:
        """M alone, a view of each layer's M over S (or of their gradients)."""
        parts = self.last.shape[-1]
        return [state[:, : state.shape[1] // parts] for state in states]

    def anchor(self, p: int) -> list[Tensor]:
        return self.anchors if p == 0 and self.anchors else self.memories([x[p] for x in self.x])

    def write(self, to_the_end: bool) -> list[Tensor]:
        """Chunk after chunk. Returns the states after the last chunk, or nothing if they are not wanted."""
        end = [torch.empty_like(x[0]) for x in self.x] if to_the_end else []
        for p in range(len(self.q)):
            self.sources.write(p, self.anchor(p))
            after = [x[p + 1] for x in self.x] if p + 1 < len(self.q) else end
            for k, w, x, out in zip(self.sources.keys, self.sources.values, self.x, after):
                linear.write(k[p], w[p], x[p], self.last[p], self.keep[p], out)
        return end

    def move_anchors(self, anchors: list[Tensor], end: list[Tensor], reached: Tensor) -> list[Tensor]:
        """The anchors after the last chunk: in rows that `reached` (g, N, 1, 1) the end of a chunk, their M there."""
        for p in range(len(self.q)):
            after = self.memories([x[p + 1] for x in self.x] if p + 1 < len(self.q) else end)
            anchors = [torch.where(reached[p], new, old) for new, old in zip(after, anchors)]
        return anchors

    def layer(self, i: int) -> tuple:
        """k, w, x of a layer for all chunks, and the decays: what `linear.read` wants beside the queries."""
        return *(
            each[i].flatten(0, 1) for each in (self.sources.keys, self.sources.values, self.x)
        ), self.decay

    def read(self) -> Tensor:
        """y: (g, N, L, d_v)."""
        y = linear.read(self.q.flatten(0, 1), *self.layer(0))
        if len(self.x) == 2:
            y = linear.read(gelu(y, out=y), *self.layer(1))
        return self.chunks(y)

    def backward(self, grad: Tensor, d_end: list[Tensor], reached: Tensor | None, d_kept: list[Tensor]):
        """From the gradients of y and of the states after the last chunk to those of all that the group was given:
        (q, k, v, theta, eta, alpha), states, anchors.

        reached, d_kept: what `pass_on_anchors` says. d_end and d_kept are overwritten.
        """
        d_q, d_keys, d_values, d_x, d_carry, d_response = self.read_backward(grad)
        d_last, d_keep = torch.zeros_like(self.last), torch.zeros_like(self.keep)
        d_anchors = [torch.zeros_like(anchor) for anchor in self.anchors]
        for p in reversed(range(len(self.q))):
            d_after = d_end if p + 1 == len(self.q) else [d[p + 1] for d in d_x]
            d_before = [d[p] for d in d_x]
            if reached is not None:
                pass_on_anchors(d_kept, reached[p], self.memories(d_after))
            layers = zip(d_after, self.sources.keys, self.sources.values, self.x, d_keys, d_values, d_before)
            for d_out, k, w, x, d_k, d_w, d_in in layers:
                of_decays = linear.write_backward(
                    d_out, k[p], w[p], x[p], self.last[p], self.keep[p], d_k[p], d_w[p], d_in
                )
                d_last[p] += of_decays[0]
                d_keep[p] += of_decays[1]
            d_anchor = d_anchors if p == 0 and d_anchors else self.memories(d_before)
            self.sources.write_backward(p, self.anchor(p), d_keys, d_values, d_anchor)
        d_k, d_v, d_step = self.sources.close(d_keys, d_values, d_carry, d_response)
        d_last, d_keep = d_last.flatten(0, 1), d_keep.flatten(0, 1)
        d_theta, d_eta, d_alpha = decays_backward(self.decay, d_carry, d_response, d_last, d_keep)
        d_gates = (d_step if d_theta is None else d_theta), d_eta, d_alpha
        d_gates = (None if d is None else self.chunks(d) for d in d_gates)
        return (self.chunks(d_q), d_k, d_v, *d_gates), [d[0] for d in d_x], d_anchors

    def read_backward(self, grad: Tensor):
        """Gradients of q, of each layer's keys, values and states before the chunks, of decay.carry and .response."""
        queries = [self.q.flatten(0, 1)]
        if len(self.x) == 2:
            hidden = linear.read(queries[0], *self.layer(0))
            queries.append(gelu(hidden, out=torch.empty_like(hidden)))
        grad = grad.flatten(0, 1)
        layers = []
        for i in reversed(range(len(self.x))):
            d_x = torch.empty_like(self.x[i])
            grad, d_k, d_w, d_carry, d_response = linear.read_backward(
                grad, queries[i], *self.layer(i), d_x.flatten(0, 1)
            )
            layers.insert(0, (self.chunks(d_k), self.chunks(d_w), d_x, d_carry, d_response))
            if i == 1:
                grad = gelu_backward(grad, hidden, out=grad)
        d_keys, d_values, d_x, d_carry, d_response = zip(*layers)
        return grad, d_keys, d_values, d_x, sum(d_carry), sum(d_response)


def pass_on_anchors(d_kept: list[Tensor], reached: Tensor, d_memories: list[Tensor]) -> None:
    """At the end of a chunk, backwards: the rows that `reached` (N, 1, 1) it took on their M as anchor.

    d_kept: gradients of the anchors after it, which become those of the anchors before it.
    """
    for d_anchor, d_memory in zip(d_kept, d_memories):
        d_memory += d_anchor * reached
        d_anchor *= ~reached
