"""A memory that learns at test time: read and written token by token, its inner gradients taken chunk by chunk.

For each row of the batch and each head a memory of one linear layer, x M, or of two, gelu(x W1) W2, is trained on the
stream of keys and values that it is shown. One step on token t, with ℓ(M; k, v) = ‖M(k) − v‖² (Titans, 2501.00663,
equations 10, 13 and 14):

    S_t = η_t S_{t−1} − θ_t grad_t          M_t = (1 − α_t) M_{t−1} + S_t          y_t = M_t(q_t)

`gradient` says what grad_t is:

- "chunk": ∇ℓ(anchor; k_t, v_t), where the anchor is the memory before the first token of t's chunk (as in TTT,
  2407.04620). With `window` w > 1 it is the sum of ∇ℓ(anchor; k_i, v_i) over the last w tokens i ≤ t (the Omega rule
  of ATLAS, 2505.23735); the window reaches across chunks, and a token of an earlier chunk counts at today's anchor.
- "token": ∇ℓ(M̃; k_t, v_t) at the decayed memory M̃ = (1 − α_t) M_{t−1} itself, the gated delta rule (2412.06464):
  M_t = M̃ − θ_t grad_t. Linear memory, no momentum; the same for every chunk_size.
- "none": no inner gradient but the decaying sum M_t = (1 − α_t) M_{t−1} + θ_t k_tᵀ v_t. Linear, no momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..paths import choose
from . import closed, reference
from .state import ChunkState, check

__all__ = ["ChunkState", "chunk_memory"]


def chunk_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: ChunkState,
    *,
    chunk_size: int,
    first: int | None = None,
    active: Tensor | None = None,
    gradient: str = "chunk",
    window: int = 1,
    path: str | None = None,
) -> tuple[Tensor, ChunkState]:
    """Show the memory T tokens: what it reads for each (after writing it), and its state after the last.

    Args:
        q, k: (B, H, T, d), v: (B, H, T, d_v); bf16, fp16, fp32 or fp64. All arithmetic is in float32, in float64
            for float64. At depth 1 d_v may differ from d; at depth 2 the weights are (d, hidden) and (hidden, d_v).
        theta: (B, H, T) floats, the step sizes. eta: the same, the momentum; None: no momentum, S_t = −θ_t grad_t.
            alpha: the same, the decay; None: none. Any values, usually 0 to 1.
        state: as `ChunkState` says. It is never changed in place.
        chunk_size: tokens to a chunk, at least 1.
        first: how many tokens still fit into the open chunk, 1 to chunk_size (the default: a new chunk opens).
        active: (B, T) bool; None: all. A token that is not active changes nothing, is not counted, and reads y = 0.
            Contract: columns are places in chunks, the same for each row, and a row's active columns are contiguous.
            Inactive columns before them are places taken in earlier calls; those after them are not reached yet. So
            `first` is what is left of the open chunk in the row that has used least of it.
        gradient, window: above.
        path: "reference", "cpu" (the closed form in plain torch, for any device) or "triton" (which takes the closed
            form for what it has no kernels for); None leaves it to MEMLAYERS_KERNELS, then to the device.

    Returns:
        y: (B, H, T, d_v) in q's dtype, and the new state. One call, or the same tokens split over calls anywhere (with
        `first` what is left of the chunk), gives the same y and the same state.

    Raises:
        ValueError naming the argument: shapes, dtypes, devices; T = 0; chunk_size, first, window or gradient out of
        range; a depth, momentum or window that `gradient` does not support; missing or superfluous parts of the state.
    """
    first = chunk_size if first is None else first
    check(q, k, v, theta, eta, alpha, state, chunk_size, first, active, gradient, window)
    path = choose("chunk_memory", q.device, path, closed=True)
    arguments = q, k, v, theta, eta, alpha, state, chunk_size, first, active, gradient, window
    with torch.autocast(q.device.type, enabled=False):
        if path == "reference":
            return reference.chunk_memory(*arguments)
        if path == "cpu":
            return closed.chunk_memory(*arguments)
        from . import triton  # imported on first use: it needs the package triton

        return triton.chunk_memory(*arguments)
