"""`chunk_memory` alone, what a neural memory layer is built on; `memlayers bench neural` prints it beside the layers.

Random q, k, v and gates; the backward pass goes to all of them and to the initial memory. On a CPU the closed form in
float32. On a GPU, in bf16 at a larger size, the Triton path beside the closed form in PyTorch, and beside the gated
delta rule of flash-linear-attention where that is installed (the same function as our rule `delta`). There also tokens
a second, and the share of the bandwidth of a copy measured in the same run. The bytes that must move are each token's
q, k, v, y and gates (backward: those, the gradient of y, and the gradients of q, k, v and the gates), and the state in
float32 once a chunk, written forward and read backward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from memlayers.eval.speed.timing import installed, peak_memories, percentiles, time_rounds
from memlayers.kernels.chunk_memory import ChunkState, chunk_memory

FLA = "flash-linear-attention"
CORES = {"titans, depth 1": ("chunk", 1), "titans, depth 2": ("chunk", 2), "delta, depth 1": ("token", 1)}
"""`gradient` and depth of what is timed; "chunk" with momentum, all with decay."""


def compare_core(
    rounds: int, device: str, batch=2, heads=4, length=1024, dim=64, chunk=64, dtype=torch.float32
) -> dict:
    """`chunk_memory` alone, forward, and forward with backward; on a GPU its paths, fla, and a copy."""
    gpu = device.startswith("cuda")
    paths = {"triton": "triton", "closed form": "cpu"} if gpu else {"closed form": "cpu"}
    arms = {}
    for core, (gradient, depth) in CORES.items():
        for label, path in paths.items():
            run = _chunk_memory(batch, heads, length, dim, chunk, dtype, device, gradient, depth, path)
            arms |= _forward_and_both(f"{core}, {label}", *run)
    if gpu and installed(FLA):
        arms |= _forward_and_both(FLA, *_fla(batch, heads, length, dim, dtype, device))
    peaks = peak_memories({name: arm for name, arm in arms.items() if name.endswith("backward")}, device)
    if gpu:
        source = torch.randn(4, batch, heads, length, dim, device=device, dtype=dtype)
        target = torch.empty_like(source)
        arms["copy"] = lambda: target.copy_(source)
    seconds = time_rounds(arms, rounds)
    report = {
        "work": f"{batch} × {length} tokens, {heads} heads of {dim}, chunks of {chunk}, {dtype}",
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        "peak MB": {name: peak / 1e6 for name, peak in peaks.items()},
    }
    if gpu:
        report |= _gpu_figures(seconds, batch, heads, length, dim, chunk, dtype, 2 * source.nbytes)
    return report


def _streams(batch, heads, length, dim, dtype, device, seed=0) -> tuple[list, list]:
    """q, k (of length 1) and v, (batch, heads, length, dim), and θ, η and α, (batch, heads, length)."""
    generator = torch.Generator(device).manual_seed(seed)
    made = {"device": device, "generator": generator}
    q, k, v = (torch.randn(batch, heads, length, dim, **made) for _ in range(3))
    streams = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]
    levels = {"theta": 0.01, "eta": 0.9, "alpha": 0.01}
    gates = [level * (0.9 + 0.2 * torch.rand(batch, heads, length, **made)) for level in levels.values()]
    return [x.to(dtype).requires_grad_() for x in streams], [gate.requires_grad_() for gate in gates]


def _chunk_memory(batch, heads, length, dim, chunk, dtype, device, gradient, depth, path):
    """The call, what it is differentiated in, and the gradient that comes back to y."""
    streams, (theta, eta, alpha) = _streams(batch, heads, length, dim, dtype, device)
    sizes = [(dim, dim)] if depth == 1 else [(dim, 4 * dim), (4 * dim, dim)]
    weights = tuple(
        (torch.randn(batch, heads, *size, device=device) * size[0] ** -0.5).requires_grad_() for size in sizes
    )
    chunked = gradient == "chunk"
    state = ChunkState(
        weights,
        momentum=tuple(torch.zeros_like(w) for w in weights) if chunked else (),
        anchor=weights if chunked else (),
    )
    gates = (theta, eta if chunked else None, alpha)

    def call() -> torch.Tensor:
        return chunk_memory(*streams, *gates, state, chunk_size=chunk, gradient=gradient, path=path)[0]

    leaves = [*streams, *(gate for gate in gates if gate is not None), *weights]
    return call, leaves, torch.randn(batch, heads, length, dim, device=device).to(dtype)


def _fla(batch, heads, length, dim, dtype, device):
    """The same for fla's gated delta rule, whose tensors are (batch, length, heads, …).

    Its S ← exp(g) S, S ← S + β kᵀ(v − k S) is ours with g = log(1 − α) and β = 2 θ.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    streams, (theta, _, alpha) = _streams(batch, heads, length, dim, dtype, device)
    with torch.no_grad():
        beta, g = (2 * theta).to(dtype), torch.log1p(-alpha)
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (*streams, g, beta)]
    initial = torch.randn(batch, heads, dim, dim, device=device).mul(dim**-0.5).requires_grad_()

    def call() -> torch.Tensor:
        return chunk_gated_delta_rule(*leaves, scale=1.0, initial_state=initial, output_final_state=True)[0]

    return call, [*leaves, initial], torch.randn(batch, length, heads, dim, device=device).to(dtype)


def _forward_and_both(name: str, call: Callable, leaves: list, direction: torch.Tensor) -> dict:
    """The two arms of a call: without a gradient, and with the backward pass."""

    def forward():
        with torch.no_grad():
            call()

    def both():
        torch.autograd.grad(call(), leaves, direction)

    return {f"{name}: forward": forward, f"{name}: forward and backward": both}


def _gpu_figures(seconds, batch, heads, length, dim, chunk, dtype, copied: int) -> dict:
    """Tokens a second, share of a copy's bandwidth, and every other path's time over that of Triton."""
    copy = copied / np.median(seconds["copy"])
    timed = {name: found for name, found in seconds.items() if name != "copy"}
    share, over = {}, {}
    for name, found in timed.items():
        kernel, _, part = name.partition(": ")
        core = "delta, depth 1" if kernel == FLA else kernel.rpartition(", ")[0]
        moved = batch * heads * length * bytes_moved(*CORES[core], dim, chunk, dtype.itemsize, part)
        share[name] = percentiles(moved / found / copy)
        if not kernel.endswith(", triton"):
            over[name] = percentiles(found / seconds[f"{core}, triton: {part}"])
    return {
        "million tokens/s": {
            name: percentiles(batch * length / found / 1e6) for name, found in timed.items()
        },
        "copy TB/s": {"copy": copy / 1e12},
        "share of copy": share,
        "times triton": over,
    }


def bytes_moved(gradient: str, depth: int, dim: int, chunk: int, itemsize: int, part: str) -> float:
    """Bytes that must move for one token of one head; `part`: "forward", or "forward and backward"."""
    chunked = gradient == "chunk"
    gates = 4 * (3 if chunked else 2)
    size = dim * dim if depth == 1 else 8 * dim * dim
    state = 4 * size * (2 if chunked else 1) / chunk
    forward = 4 * dim * itemsize + gates + state
    if part == "forward":
        return forward
    return forward + (4 + 3) * dim * itemsize + 2 * gates + state
