"""What a chunk memory carries from call to call, and the check of everything that `chunk_memory` is given."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DEPTH = {"chunk": 2, "token": 1, "none": 1}  # by `gradient`


class ChunkState(NamedTuple):
    """The memory of B rows and H heads between two calls: float32, float64 for float64 inputs.

    weights: M now, one (B, H, d_in, d_out) for each layer.
    momentum: S now, like weights; () without momentum.
    anchor: the weights before the first token of the open chunk, like weights; () for gradient "token" and "none".
    halo: (k, v) of the last window - 1 active tokens, oldest first, (B, H, window - 1, width) each, zeros for those
        before the start of the stream (they have no gradient); () when window is 1.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] = ()
    anchor: tuple[Tensor, ...] = ()
    halo: tuple[Tensor, ...] = ()


def check(
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
) -> None:
    """Raise ValueError, naming the argument, for what can be said without looking at the numbers."""
    check_rule(len(state.weights), eta is not None, chunk_size, first, gradient, window)
    check_streams(q, k, v)
    b, h, t, _ = q.shape
    for name, gate in {"theta": theta, "eta": eta, "alpha": alpha}.items():
        if gate is None and name != "theta":
            continue
        if not isinstance(gate, Tensor) or not gate.is_floating_point():
            refuse(name, f"expected floats of shape {(b, h, t)}")
        check_tensor(name, gate, (b, h, t), gate.dtype, q.device)
    if active is not None:
        check_tensor("active", active, (b, t), torch.bool, q.device)
    check_state(state, q, v, eta is not None, gradient, window)


def check_rule(depth: int, momentum: bool, chunk_size: int, first: int, gradient: str, window: int) -> None:
    if gradient not in MAX_DEPTH:
        refuse("gradient", f"{gradient!r} is none of {', '.join(MAX_DEPTH)}")
    for name, value, most in (
        ("chunk_size", chunk_size, None),
        ("window", window, None),
        ("first", first, chunk_size),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 1 or (most is not None and value > most):
            limits = "of at least 1" if most is None else f"from 1 to chunk_size, {most}"
            refuse(name, f"{value!r} is not a whole number {limits}")
    if not 1 <= depth <= MAX_DEPTH[gradient]:
        refuse(
            "state.weights",
            f"{depth} layers; gradient {gradient!r} has a closed form for 1"
            + (" or 2" if MAX_DEPTH[gradient] == 2 else ""),
        )
    if momentum and gradient != "chunk":
        refuse("eta", f"gradient {gradient!r} has no momentum; eta must be None")
    if window > 1 and gradient != "chunk":
        refuse("window", f"{window}, but only gradient 'chunk' has windows of more than one token")


def check_streams(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, stream in {"q": q, "k": k, "v": v}.items():
        if stream.dim() != 4 or not stream.is_floating_point():
            refuse(
                name, f"a {stream.dtype} tensor of shape {tuple(stream.shape)}; expected floats (B, H, T, d)"
            )
    if q.shape[2] == 0:
        refuse("q", "no tokens: T is 0")
    check_tensor("k", k, tuple(q.shape), q.dtype, q.device)
    check_tensor("v", v, (*q.shape[:3], v.shape[3]), q.dtype, q.device)


def check_state(state: ChunkState, q: Tensor, v: Tensor, momentum: bool, gradient: str, window: int) -> None:
    b, h, _, d = q.shape
    depth = len(state.weights)
    precise = torch.promote_types(q.dtype, torch.float32)
    widths = [d, *(weights.shape[-1] for weights in state.weights[:-1]), v.shape[-1]]
    layers = [(b, h, d_in, d_out) for d_in, d_out in pairwise(widths)]
    halo = [(b, h, window - 1, d), (b, h, window - 1, v.shape[-1])]
    expected = {
        "weights": layers,
        "momentum": layers if momentum else [],
        "anchor": layers if gradient == "chunk" else [],
        "halo": halo if window > 1 else [],
    }
    for name, shapes in expected.items():
        part = getattr(state, name)
        if len(part) != len(shapes):
            why = {"momentum": "with eta" if momentum else "without eta", "halo": f"with window {window}"}
            refuse(
                f"state.{name}",
                f"{len(part)} tensors; {why.get(name, f'with gradient {gradient!r} and depth {depth}')} "
                f"it has {len(shapes)}",
            )
        for i, (tensor, shape) in enumerate(zip(part, shapes)):
            check_tensor(f"state.{name}[{i}]", tensor, shape, precise, q.device)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        refuse(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape {shape}")
    if tensor.device != device:
        refuse(name, f"is on {tensor.device}, q is on {device}")


def refuse(name: str, why: str) -> None:
    raise ValueError(f"chunk_memory: {name}: {why}")
