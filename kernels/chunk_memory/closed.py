"""The chunk memory in closed form: plain torch, many tokens at once, on any device.

What M_t holds is linear in the writes of the chunk's tokens (`decay.py`), and what a token writes depends on the memory
at the chunk's start only (`sources.py`). So a run of chunks is a loop of a few products each, from one chunk's start
to the next one's, and then one read of all chunks (`linear.py`); `group.py` puts it together.

The backward pass is written by hand, without autograd. It saves the inputs and states (of every chunk if they
are small, else of every few) and computes the rest again: memory in proportion to tokens × width.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group import Group, Rule
from .layout import cut, paste, runs, silence, with_halo
from .state import ChunkState

# Chunks to a group: GROUP_ROOM numbers for each stream of the widest layer, at most GROUP_CHUNKS chunks; but so many
# that one state to a group, which is saved, takes no more than SAVE times the room of the group's q, k and v. Where a
# state to a chunk takes no more than SAVE_ALL times the room of the chunk's, all are saved and not computed again.
GROUP_ROOM = 2**16
GROUP_CHUNKS = 32
SAVE = 4
SAVE_ALL = 1


def chunk_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: ChunkState,
    chunk_size: int,
    first: int,
    active: Tensor | None,
    gradient: str,
    window: int,
) -> tuple[Tensor, ChunkState]:
    precise = torch.promote_types(q.dtype, torch.float32)
    alpha = torch.zeros_like(theta) if alpha is None else alpha
    gates = [None if gate is None else gate.to(precise) for gate in (theta, eta, alpha)]
    later = None
    if active is not None:
        q, k, v, gates = silence(q, k, v, gates, ~active[:, None])
        later = active.flip(1).cumsum(1).flip(1) > 0  # (B, T): active here or further on
    gates.append(None if active is None else active[:, None].expand_as(theta).to(precise))
    halo = state.halo
    if window > 1:
        k, v, halo = with_halo(k.to(precise), v.to(precise), halo, active)
    rule = Rule(gradient, window, len(state.weights))
    outputs = []
    for start, stop, length, closes in runs(q.shape[2], chunk_size, first):
        here, sources = slice(start, stop), slice(start, stop + window - 1)
        streams = q[:, :, here], k[:, :, sources], v[:, :, sources]
        gates_here = [None if gate is None else gate[:, :, here] for gate in gates]
        reached = None if later is None or not closes else later[:, start + length - 1 : stop : length]
        y, state = run(rule, length, closes, reached, streams, gates_here, state)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2), state._replace(halo=halo)


def run(
    rule: Rule, length: int, closes: bool, reached: Tensor | None, streams, gates, state: ChunkState
) -> tuple[Tensor, ChunkState]:
    """One run of chunks. reached (B, n chunks): where a row came to the end of the chunk; None: every row did."""
    if not (closes and state.anchor):
        reached = None
    n = len(state.weights)
    stacked = [torch.cat(layer, 2) for layer in zip(*filter(None, (state.weights, state.momentum)))]
    y, *after = Run.apply(rule, length, reached, *streams, *gates, *stacked, *state.anchor)
    split = [x.unflatten(2, (-1, w.shape[2])).unbind(2) for x, w in zip(after, state.weights)]
    weights, *momentum = zip(*split)
    anchor = state.anchor
    if closes and anchor:
        anchor = weights if reached is None else tuple(after[n:])
    return y, ChunkState(weights, momentum[0] if momentum else (), anchor)


class Run(torch.autograd.Function):
    """`run` with states as M over S, (B, H, P d_in, d_out), and the gradients."""

    @staticmethod
    def forward(ctx, rule: Rule, length: int, reached: Tensor | None, *inputs: Tensor | None):
        """inputs: q, k, v, theta, eta, alpha, active, the states, and for gradient "chunk" the anchors.

        Returns y, the states after the run and, if `reached` is given, the anchors after it.
        """
        given = Given(rule, length, reached, inputs)
        q, _, v = given.streams
        y = torch.empty_like(v[:, :, : given.n_chunks * length], dtype=q.dtype)
        now, kept, saved = given.states, given.anchors, []
        for chunks in given.groups():
            group = given.group(chunks, now)
            group.write(to_the_end=True)
            saved += [layer.x for layer in group.layers] if given.save_all else now
            now = [layer.x[-1].clone() for layer in group.layers]
            paste(y, group.read(), chunks, length)
            if reached is not None:
                kept = group.move_anchors(kept, given.reached(chunks))
            del group  # before the next one takes as much memory
        ctx.save_for_backward(reached, *inputs, *saved)
        ctx.rule, ctx.length, ctx.n_inputs = rule, length, len(inputs)
        after = now if reached is None else now + kept
        return y, *(x.unflatten(0, y.shape[:2]) for x in after)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, *d_after: Tensor):
        reached, *tensors = ctx.saved_tensors
        given = Given(ctx.rule, ctx.length, reached, tensors[: ctx.n_inputs])
        with torch.autocast(d_y.device.type, enabled=False):
            return None, None, None, *given.backward(tensors[ctx.n_inputs :], d_y, d_after)


class Given:
    """The inputs of a run, and how they fall into groups of chunks. States and anchors as (B H, ...)."""

    def __init__(self, rule: Rule, length: int, reached: Tensor | None, inputs):
        self.rule, self.length, self.where_reached = rule, length, reached
        self.streams, self.gates, rest = inputs[:3], inputs[3:7], [x.flatten(0, 1) for x in inputs[7:]]
        self.states, self.anchors = rest[: rule.depth], rest[rule.depth :]
        self.extras = 0, rule.window - 1, rule.window - 1, 0, 0, 0, 0
        self.n_chunks = self.streams[0].shape[2] // length
        self.widest = max(x.shape[-1] for x in (*self.streams, *self.states))
        tokens = length * sum(x.shape[3] for x in self.streams)
        self.share = sum(x[0].numel() for x in self.states) / tokens
        self.save_all = self.share <= SAVE_ALL

    def groups(self) -> list[range]:
        size = min(GROUP_ROOM // (self.length * self.widest), GROUP_CHUNKS)
        size = max(size, ceil(self.share / SAVE), 1)
        return [range(i, min(i + size, self.n_chunks)) for i in range(0, self.n_chunks, size)]

    def group(self, chunks: range, states: list[Tensor]) -> Group:
        tokens = [self.cut(x, chunks, extra) for x, extra in zip((*self.streams, *self.gates), self.extras)]
        return Group(self.rule, *tokens, states, self.anchors if chunks.start == 0 else [])

    def cut(self, x: Tensor | None, chunks: range, extra: int = 0) -> Tensor | None:
        return None if x is None else cut(x, chunks, self.length, extra, self.states[0].dtype)

    def reached(self, chunks: range) -> Tensor:
        """(g, B H, 1, 1)"""
        here = self.where_reached[:, chunks.start : chunks.stop].T[:, :, None]
        return here.expand(-1, -1, self.streams[0].shape[1]).flatten(1)[..., None, None]

    def backward(self, saved: list[Tensor], d_y: Tensor, d_after) -> list[Tensor | None]:
        """The gradients of the inputs, last group first."""
        depth = self.rule.depth
        d_after = [d.flatten(0, 1).clone() for d in d_after]
        d_now, d_kept = d_after[:depth], d_after[depth:]
        d_inputs = [
            None if x is None else (torch.zeros_like if extra else torch.empty_like)(x)
            for x, extra in zip((*self.streams, *self.gates[:3]), self.extras)
        ]
        for i, chunks in reversed(list(enumerate(self.groups()))):
            group = self.group(chunks, saved[depth * i : depth * (i + 1)])
            group.write(to_the_end=False)
            reached = None if self.where_reached is None else self.reached(chunks)
            d_tokens, d_now, d_anchors = group.backward(self.cut(d_y, chunks), d_now, d_kept, reached)
            for x, pieces, extra in zip(d_inputs, d_tokens, self.extras):
                if x is not None:
                    paste(x, pieces, chunks, self.length, extra)
            del group, d_tokens, pieces
        if d_kept:
            d_anchors = [a + b for a, b in zip(d_anchors, d_kept)]
        return [*d_inputs, None, *(d.unflatten(0, d_y.shape[:2]) for d in (*d_now, *d_anchors))]
