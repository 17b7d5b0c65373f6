"""From projected tokens to queries, keys and values: causal convolution, SiLU and the ℓ2-norm of each head.

One autograd function, for these are many small steps over the widest tensor of the memory. It works on a block of
tokens at a time, so that on a CPU each step finds its numbers in the cache, keeps only its inputs for the backward
pass, and computes in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .packing import Packing

EPS = 1e-6
BLOCK = 256
"""Tokens of all rows together that are worked on at a time on a CPU."""


def streams(
    x: torch.Tensor,
    heads: int,
    weight: torch.Tensor | None,
    tail: torch.Tensor | None,
    packing: Packing | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q = unit(silu(c(x_q))), k = unit(silu(c(x_k))) and v = silu(c(x_v)), c(x)_t = Σ_i weight[i] ⊙ x_{t-kernel+1+i}.

    Args:
        x: (B, T, 3 · heads · head_dim), projections to queries, keys and values side by side.
        weight: (kernel, 3 · heads · head_dim), the present token last; None: no convolution, and no tail.
        tail: (B, kernel - 1, 3 · heads · head_dim), what stood before x.
        packing: where rows start and end when they do not fill all of x; what comes out is of use only between.

    Returns:
        q, k, v: (B, heads, T, head_dim) in the dtype of x, and the tail for the next call, in the dtype of `tail`.
    """
    if weight is None:
        return *_Streams.apply(x, x[:, :0], None, heads), None
    before = tail.to(x.dtype)
    if packing is None:
        new_tail = torch.cat([before, x[:, -tail.shape[1] :]], dim=1)[:, -tail.shape[1] :]
    else:
        inputs = torch.cat([torch.zeros_like(before), x], dim=1)
        inputs = inputs.scatter(1, _columns(packing.start, tail), before)
        new_tail = inputs.gather(1, _columns(packing.end, tail))
        before, x = inputs.split([tail.shape[1], x.shape[1]], dim=1)
    return *_Streams.apply(x, before, weight, heads), new_tail.to(tail.dtype)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / ‖x‖ over the last dimension, computed in float32 or better, in the dtype of x."""
    precise = x.to(_precise(x))
    return (precise * _inverse_norm(precise)).to(x.dtype)


class _Streams(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, before, weight, heads):
        ctx.save_for_backward(x, before, weight)
        ctx.heads = heads
        batch, length, width = x.shape
        outputs = [x.new_empty(batch, heads, length, width // (3 * heads)) for _ in range(3)]
        for start, stop in _blocks(x):
            inputs = _inputs(x, before, start, stop)
            parts = F.silu(_convolved(inputs, weight, stop - start)).unflatten(-1, (3, heads, -1))
            normed = parts[:, :, :2]
            normed *= _inverse_norm(normed)
            for output, part in zip(outputs, parts.unbind(2)):
                output[:, :, start:stop] = part.transpose(1, 2)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, before, weight = ctx.saved_tensors
        n_before, precise = before.shape[1], _precise(x)
        d_inputs = x.new_zeros(len(x), n_before + x.shape[1], x.shape[2], dtype=precise)
        d_weight = None if weight is None else torch.zeros_like(weight, dtype=precise)
        for start, stop in _blocks(x):
            inputs = _inputs(x, before, start, stop)
            convolved = _convolved(inputs, weight, stop - start)
            parts = F.silu(convolved).unflatten(-1, (3, ctx.heads, -1))
            d_parts = torch.stack([grad[:, :, start:stop].transpose(1, 2) for grad in grads], 2).to(precise)
            _norm_backward(parts[:, :, :2], d_parts[:, :, :2])
            d = torch.ops.aten.silu_backward(d_parts.flatten(2), convolved)
            if weight is None:
                d_inputs[:, start:stop] = d
                continue
            for i, tap in enumerate(weight.to(precise)):
                d_inputs[:, start + i : stop + i].addcmul_(d, tap)
                d_weight[i] += (d * inputs[:, i : i + stop - start]).sum((0, 1))
        d_before, d_x = d_inputs.to(x.dtype).split([n_before, x.shape[1]], dim=1)
        return d_x, d_before, None if weight is None else d_weight.to(weight.dtype), None


def _blocks(x: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of tokens; all at once where there is no cache to spare."""
    batch, length = x.shape[:2]
    step = max(8, BLOCK // max(batch, 1)) if x.device.type == "cpu" else length
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _inputs(x: torch.Tensor, before: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The tokens start .. stop - 1 and the kernel - 1 before them."""
    reach = before.shape[1]
    inputs = x[:, max(start - reach, 0) : stop]
    if start < reach:
        inputs = torch.cat([before[:, start:], inputs], dim=1)
    return inputs.to(_precise(x))


def _convolved(inputs: torch.Tensor, weight: torch.Tensor | None, length: int) -> torch.Tensor:
    if weight is None:
        return inputs
    first, *others = weight.to(inputs.dtype)
    convolved = inputs[:, :length] * first
    for i, tap in enumerate(others, start=1):
        convolved.addcmul_(inputs[:, i : i + length], tap)
    return convolved


def _inverse_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(torch.linalg.vecdot(x, x) + EPS)[..., None]


def _norm_backward(x: torch.Tensor, d: torch.Tensor) -> None:
    """Turns the gradient `d` of x · r, r = (‖x‖² + ε)^-½, into that of x: r (d − xr ⟨d, xr⟩). Both are overwritten."""
    scale = _inverse_norm(x)
    x *= scale
    d.addcmul_(x, torch.linalg.vecdot(d, x)[..., None], value=-1)
    d *= scale


def _precise(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _columns(start: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As many columns of each row as `like` (B, n, channels) has, from `start` (B,) on; as index for dimension 1."""
    columns = start[:, None] + torch.arange(like.shape[1], device=like.device)
    return columns[..., None].expand(like.shape)
