"""Exact top-k over all pairs of product keys, from the scores of the two halves (1907.05242, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..paths import choose
from . import cpu, reference


def product_key_topk(
    scores_1: Tensor, scores_2: Tensor, k: int, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k greatest of the n_keys ** 2 sums scores_1[..., i] + scores_2[..., j], greatest first.

    scores_1, scores_2: (..., n_keys), float of one dtype; bf16 and fp16 are summed and ranked in float32.
    Returns scores (..., k) in that dtype and indices (..., k) int64, i * n_keys + j. Indices of a row are
    distinct; which of equal sums is taken is not specified, as in torch.topk. Gradients reach the chosen
    entries of both inputs, summed in a fixed order (the triton path is differentiable once).

    `path`: "reference", "cpu" or "triton"; None leaves it to MEMLAYERS_KERNELS, then to the device.

    ValueError: k below 1 or above n_keys; shapes, dtypes or devices that differ; NaN, with the rows it stands
    in. On a GPU, NaN is a device-side assertion instead, so that no step waits for the answer.
    """
    check(scores_1, scores_2, k)
    chosen = choose("product_key_topk", scores_1.device, path)
    on_gpu = scores_1.is_cuda
    if not on_gpu:
        refuse_nan("scores_1", scores_1)
        refuse_nan("scores_2", scores_2)
    if chosen == "reference":
        scores, indices = reference.product_key_topk(scores_1, scores_2, k)
    elif chosen == "cpu":
        scores, indices = cpu.product_key_topk(scores_1, scores_2, k)
    else:
        from . import triton

        scores, indices = triton.product_key_topk(scores_1, scores_2, k)
    if on_gpu:  # NaN ranks first, so one in a row is in its first sum
        clean = scores.detach()[..., 0].isnan().logical_not().all()
        torch._assert_async(clean, "product_key_topk: scores_1 or scores_2 holds NaN, or +inf beside -inf")
    return scores, indices


def check(scores_1: Tensor, scores_2: Tensor, k: int) -> None:
    """Raise ValueError, naming the argument, for what can be said without looking at the scores."""
    if scores_1.dim() == 0 or not scores_1.is_floating_point():
        raise ValueError(
            f"product_key_topk: scores_1 is a {scores_1.dtype} tensor of shape {tuple(scores_1.shape)}; "
            "expected floats of shape (..., n_keys)"
        )
    for what in ("shape", "dtype", "device"):
        one, two = getattr(scores_1, what), getattr(scores_2, what)
        if one != two:
            raise ValueError(f"product_key_topk: scores_1 and scores_2 differ in {what}: {one} and {two}")
    n_keys = scores_1.shape[-1]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_keys:
        raise ValueError(
            f"product_key_topk: k is {k!r}; it must be a whole number from 1 to n_keys, {n_keys}"
        )


def refuse_nan(name: str, scores: Tensor) -> None:
    """Raise ValueError with the rows of `scores` that hold NaN. One pass when there is none: a sum carries NaN."""
    scores = scores.detach()
    if not scores.sum().isnan():
        return
    rows = scores.isnan().any(-1)
    if rows.any():
        where = [tuple(row) for row in rows.nonzero()[:5].tolist()]
        more = "" if rows.sum() <= 5 else ", ..."
        raise ValueError(
            f"product_key_topk: {name} holds NaN in {int(rows.sum())} of {rows.numel()} rows: "
            f"{', '.join(map(str, where))}{more}"
        )
