"""The chunk memory on a GPU, in Triton: one layer, with or without an inner gradient, or two; forward and backward.

A chunk's writes depend on the memory at its start only, so one kernel goes from chunk to chunk with the writes
(`triton_write.py`; `triton_deep.py` for two layers), and everything else is done for all chunks at the same time
(`triton_read.py`, `triton_decay.py`). Streams are read where they lie, in their own dtype, and turned into float32 at
once. No atomics: results and gradients are bit-equal from run to run. The backward pass saves the inputs and computes
the states again: what is kept is in proportion to tokens × width. While a pass runs there is a state to each chunk.

Windows, chunks of more than LARGEST_CHUNK tokens and float64 take the closed form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import closed
from .layout import silence
from .state import ChunkState
from .triton_cases import COMPILE_CASES
from .triton_chunks import OneLayer, TwoLayers
from .triton_tiles import Layout

__all__ = ["COMPILE_CASES", "chunk_memory"]

LARGEST_CHUNK = 64  # what the registers of a program hold


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
    if window > 1 or chunk_size > LARGEST_CHUNK or q.dtype == torch.float64:
        arguments = q, k, v, theta, eta, alpha, state, chunk_size, first, active, gradient, window
        return closed.chunk_memory(*arguments)
    if active is not None:
        q, k, v, (theta, eta, alpha) = silence(q, k, v, [theta, eta, alpha], ~active[:, None])
    b, h, t = theta.shape
    lead = chunk_size - first
    layout = Layout(b * h, t, -(-(lead + t) // chunk_size), chunk_size, lead)
    alpha = torch.zeros_like(theta) if alpha is None else alpha
    active = theta.new_ones(b, t, dtype=torch.bool) if active is None else active
    counted = active[:, None].expand(b, h, t)
    gates = [by_step(gate, fill, layout) for gate, fill in ((theta, 0), (eta, 1), (alpha, 0), (counted, 0))]
    closed_chunks = ends(active, layout)[:, None].expand(b, h).flatten()
    streams = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
    if gradient == "token":  # what it solves for whole chunks wants whole chunks
        streams = [F.pad(x, (0, 0, lead, layout.after)) for x in streams]
        layout = layout._replace(n_tokens=layout.n_chunks * chunk_size, lead=0)
    parts = filter(None, (state.weights, state.momentum))
    starts = [torch.stack(layer, 2).flatten(0, 1) for layer in zip(*parts)]
    anchors = [anchor.flatten(0, 1).contiguous() for anchor in state.anchor]

    y, *after = Memory.apply(layout, gradient, closed_chunks, *streams, *gates, *starts, *anchors)
    if gradient == "token":
        y = y[:, lead : lead + t]
    y, *after = (x.unflatten(0, (b, h)) for x in (y, *after))
    depth = len(starts)
    weights, *momentum = zip(*(end.unbind(2) for end in after[:depth]))
    return y, ChunkState(weights, momentum[0] if momentum else (), tuple(after[depth:]))


def by_step(gate: Tensor | None, fill: float, layout: Layout) -> Tensor | None:
    """(B, H, T) as (steps, C) in float32, with `fill` in the places that have no token."""
    if gate is None:
        return None
    padded = F.pad(gate.flatten(0, 1).float(), (layout.lead, layout.after), value=fill)
    return padded.view(layout.n_steps, layout.chunk_size)


def ends(active: Tensor, layout: Layout) -> Tensor:
    """(B,): how many ends of chunks a row came to. active: (B, T) bool."""
    columns = torch.arange(1, layout.n_tokens + 1, device=active.device)
    return (layout.lead + (active * columns).amax(1)) // layout.chunk_size


class Memory(torch.autograd.Function):
    """y (N, T, d_v), the states after the last token (N, P, d_in, d_out), and the anchors then, for N = batch × heads.

    closed_chunks: (N,); streams (N, T, width); gates and active (steps, C); states: for each layer its start
    (N, P, d_in, d_out), M over S, then for gradient "chunk" the anchor of each, (N, d_in, d_out).
    """

    @staticmethod
    def forward(
        ctx, layout: Layout, gradient, closed_chunks, q, k, v, theta, eta, alpha, active, *states: Tensor
    ):
        chunks, anchors = open_chunks(layout, gradient, k, v, theta, eta, alpha, active, *states)
        y = chunks.read(q)
        ctx.save_for_backward(closed_chunks, q, k, v, theta, eta, alpha, active, *states)
        ctx.layout, ctx.gradient = layout, gradient
        ends = [layer.states[:, -1].clone() for layer in chunks.layers]
        at = every(closed_chunks), closed_chunks, 0
        kept = stays(closed_chunks)
        moved = (torch.where(kept, old, layer.states[at]) for old, layer in zip(anchors, chunks.layers))
        return y, *ends, *moved

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, *d_after: Tensor):
        closed_chunks, q, *rest = ctx.saved_tensors
        chunks, _ = open_chunks(ctx.layout, ctx.gradient, *rest)
        d_q = chunks.read_backward(q, d_y.contiguous())
        depth = len(chunks.layers)
        d_ends, d_kept = d_after[:depth], d_after[depth:]
        kept = stays(closed_chunks)
        for layer, d_end in zip(chunks.layers, d_ends):
            layer.d_states[:, -1] = d_end
        for layer, d_anchor in zip(chunks.layers, d_kept):
            layer.d_states[every(closed_chunks), closed_chunks, 0] += d_anchor.masked_fill(kept, 0)
        with torch.autocast(q.device.type, enabled=False):
            (d_k, d_v, *d_gates), d_starts, d_anchors = chunks.write_backward()
        for total, d_anchor in zip(d_anchors, d_kept):
            total += d_anchor.masked_fill(~kept, 0)
        return None, None, None, d_q, d_k, d_v, *d_gates, None, *d_starts, *d_anchors


def open_chunks(
    layout: Layout, gradient: str, k, v, theta, eta, alpha, active, *states: Tensor
) -> tuple[OneLayer | TwoLayers, list[Tensor]]:
    """The chunks, written to, and the anchors among the states."""
    depth = len(states) // 2 if gradient == "chunk" else 1
    starts, anchors = states[:depth], states[depth:]
    inputs = k, v, theta, eta, alpha, active, starts, anchors
    chunks = TwoLayers(layout, *inputs) if depth == 2 else OneLayer(layout, gradient, *inputs)
    return chunks, anchors


def every(closed_chunks: Tensor) -> Tensor:
    return torch.arange(len(closed_chunks), device=closed_chunks.device)


def stays(closed_chunks: Tensor) -> Tensor:
    """(N, 1, 1): whether a memory keeps the anchor it was given."""
    return (closed_chunks == 0)[:, None, None]
