"""The chunk memory token by token in plain torch, inner gradients by autograd: the truth that other paths are held to.

Every rule, any depth. It keeps every step's memory for the backward pass, so it is for small sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import ChunkState


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
    dtype, (q, k, v) = q.dtype, (x.to(precise) for x in (q, k, v))
    if active is None:
        active = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    outputs = []
    for t in range(q.shape[2]):
        token = k[:, :, t], v[:, :, t]
        gates = [
            None if gate is None else gate[:, :, t, None, None].to(precise) for gate in (theta, eta, alpha)
        ]
        here = active[:, t, None, None, None]
        state = keep(here, step(token, gates, state, gradient, window), state)
        y = recall(state.weights, q[:, :, t, None])
        outputs.append(torch.where(here, y, 0))
        if (t + 1 - first) % chunk_size == 0 and state.anchor:  # a chunk ends, where the row has come so far
            arrived = active[:, t:].any(1)[:, None, None, None]
            state = keep(arrived, state._replace(anchor=state.weights), state)
    return torch.cat(outputs, 2).to(dtype), state


def step(
    token: tuple[Tensor, Tensor],
    gates: list[Tensor | None],
    state: ChunkState,
    gradient: str,
    window: int,
) -> ChunkState:
    """One token written: (B, H, d) key and value, gates (B, H, 1, 1). The anchor stays."""
    theta, eta, alpha = gates
    recent = [x[:, :, None] for x in token]
    if window > 1:
        recent = [torch.cat(pair, 2) for pair in zip(state.halo, recent)]
    decayed = [w if alpha is None else (1 - alpha) * w for w in state.weights]
    if gradient == "none":
        keys, values = recent
        descent = [-keys.transpose(-1, -2) @ values]
    else:
        descent = inner_gradient(state.anchor if gradient == "chunk" else decayed, *recent)
    momentum = [-theta * g for g in descent]
    if eta is not None:
        momentum = [eta * s + new for s, new in zip(state.momentum, momentum)]
    return ChunkState(
        weights=tuple(m + s for m, s in zip(decayed, momentum)),
        momentum=tuple(momentum) if eta is not None else (),
        anchor=state.anchor,
        halo=tuple(x[:, :, 1:] for x in recent) if window > 1 else (),
    )


def recall(weights: tuple[Tensor, ...] | list[Tensor], x: Tensor) -> Tensor:
    """M(x): x W1 for one layer, gelu(x W1) W2 for two."""
    for weight in weights[:-1]:
        x = F.gelu(x @ weight)
    return x @ weights[-1]


def inner_gradient(weights, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """∇ Σ ‖M(key) − value‖² at `weights`, itself differentiable in all three.

    keys, values: (B, H, n, width). Works without grad mode and in inference mode too (hence the copies).
    """
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        weights = [w.clone() if w.requires_grad else w.detach().clone().requires_grad_() for w in weights]
        loss = (recall(weights, keys.clone()) - values.clone()).square().sum()
        return torch.autograd.grad(loss, weights, create_graph=differentiable)


def keep(condition: Tensor, new: ChunkState, old: ChunkState) -> ChunkState:
    """`new` in the rows where `condition` (B, 1, 1, 1) holds, `old` in the others."""
    return ChunkState(
        *(tuple(torch.where(condition, a, b) for a, b in zip(*parts)) for parts in zip(new, old))
    )
