"""Product-key top-k in plain torch, as it is written down: the truth the other paths are held against."""

from __future__ import annotations

from torch import Tensor


def product_key_topk(scores_1: Tensor, scores_2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k of each half, all k * k sums of the two, and the top k of those (1907.05242, section 3.1)."""
    n_keys, dtype = scores_1.shape[-1], scores_1.dtype
    if dtype.itemsize < 4:
        scores_1, scores_2 = scores_1.float(), scores_2.float()
    top_1, index_1 = scores_1.topk(k)
    top_2, index_2 = scores_2.topk(k)
    sums = (top_1[..., :, None] + top_2[..., None, :]).flatten(-2)
    scores, best = sums.topk(k)
    indices = index_1.gather(-1, best // k) * n_keys + index_2.gather(-1, best % k)
    return scores.to(dtype), indices
