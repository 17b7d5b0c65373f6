"""The chunk memory on a GPU, in Triton: linear memories, forward and backward, with or without an inner gradient.

A chunk's writes depend on the memory at its start only, so one kernel goes from chunk to chunk with the writes
(`triton_write.py`), and everything else is done for all chunks at the same time (`triton_read.py`, `triton_decay.py`).
Streams are read where they lie, in their own dtype, and turned into float32 at once. No atomics: results and
gradients are bit-equal from run to run. The backward pass saves the inputs and computes the states again: memory in
proportion to tokens × width.

Two layers, windows, chunks of more than LARGEST_CHUNK tokens and float64 take the closed form.
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
from .triton_chunks import Chunks
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
    linear = len(state.weights) == 1 and window == 1
    if not linear or chunk_size > LARGEST_CHUNK or q.dtype == torch.float64:
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
    start = torch.stack((*state.weights, *state.momentum), 2).flatten(0, 1)
    anchor = state.anchor[0].flatten(0, 1).contiguous() if state.anchor else None

    y, end, anchor = LinearMemory.apply(layout, gradient, closed_chunks, *streams, *gates, start, anchor)
    if gradient == "token":
        y = y[:, lead : lead + t]
    parts = end.unflatten(0, (b, h)).unbind(2)
    momentum = () if eta is None else parts[1:]
    anchor = () if anchor is None else (anchor.unflatten(0, (b, h)),)
    return y.unflatten(0, (b, h)), ChunkState(parts[:1], momentum, anchor)


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


class LinearMemory(torch.autograd.Function):
    """y (N, T, d_v), the state after the last token (N, P, d, d_v), and the anchor then, for N = batch × heads.

    closed_chunks: (N,); streams (N, T, width); gates and active (steps, C); start (N, P, d, d_v), M over S;
    anchor (N, d, d_v), None but for gradient "chunk".
    """

    @staticmethod
    def forward(
        ctx, layout: Layout, gradient, closed_chunks, q, k, v, theta, eta, alpha, active, start, anchor
    ):
        chunks = Chunks(layout, gradient, k, v, theta, eta, alpha, active, start, anchor)
        y = chunks.read(q)
        ctx.save_for_backward(closed_chunks, q, k, v, theta, eta, alpha, active, start, anchor)
        ctx.layout, ctx.gradient = layout, gradient
        end = chunks.states[:, -1].clone()
        if anchor is None:
            return y, end, None
        memories = chunks.states[every(closed_chunks), closed_chunks, 0]
        return y, end, torch.where(stays(closed_chunks), anchor, memories)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, d_end: Tensor, d_kept: Tensor | None):
        closed_chunks, q, *rest = ctx.saved_tensors
        chunks = Chunks(ctx.layout, ctx.gradient, *rest)
        d_q = chunks.read_backward(q, d_y.contiguous())
        chunks.d_states[:, -1] = d_end
        if d_kept is not None:
            passed_on = d_kept.masked_fill(stays(closed_chunks), 0)
            chunks.d_states[every(closed_chunks), closed_chunks, 0] += passed_on
        with torch.autocast(q.device.type, enabled=False):
            d_k, d_v, *d_gates, d_start, d_anchor = chunks.write_backward()
        if d_kept is not None:
            d_anchor += d_kept.masked_fill(~stays(closed_chunks), 0)
        return None, None, None, d_q, d_k, d_v, *d_gates, None, d_start, d_anchor


def every(closed_chunks: Tensor) -> Tensor:
    return torch.arange(len(closed_chunks), device=closed_chunks.device)


def stays(closed_chunks: Tensor) -> Tensor:
    """(N, 1, 1): whether a memory keeps the anchor it was given."""
    return (closed_chunks == 0)[:, None, None]
