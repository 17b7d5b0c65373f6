"""Product-key top-k on the GPU: one program a row, everything in registers, no atomics.

Both halves are read in blocks; the k best so far are merged with the k best of each block by bitonic networks.
A score and its place are packed into one 64-bit integer whose order is the score's order, so a network moves
both at once. Of the k * k sums only the pairs of ranks that can win are formed (see cpu.py).
Scores are loaded in their own dtype and turned into float32 at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST_K = 1024  # what the registers of a program hold
LARGEST_N = 32768  # n_keys ** 2 places fit into 31 bits


@triton.jit
def pack(values, places, real):
    """int64 keys that order as the float32 `values`, NaN first, with their place; what is not `real` comes last."""
    bits = values.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(values != values, 0x7FFFFFFF, order)
    keys = (order.to(tl.int64) << 32) | places.to(tl.int64)
    return tl.where(real, keys, -0x8000000000000000)


@triton.jit
def unpack(keys):
    """The values and places that `pack` packed."""
    order = (keys >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def merge(best, keys):
    """The K greatest of two lots of K, each sorted from the greatest down."""
    return tl.bitonic_merge(tl.maximum(best, tl.flip(keys, 1)), descending=True)


@triton.jit
def forward_kernel(
    scores_1,  # (rows, n_keys)
    scores_2,  # (rows, n_keys)
    ranks,  # (2, n_pairs) int32: the pairs of ranks whose sum can win
    scores,  # (rows, k), out
    indices,  # (rows, k) int64, out
    n_keys: tl.constexpr,
    n_pairs: tl.constexpr,
    k: tl.constexpr,
    K: tl.constexpr,  # k raised to a power of two
    BLOCK: tl.constexpr,  # keys or pairs looked at in one go
):
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, 2)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    last = tl.full([], -0x8000000000000000, tl.int64)

    halves = tl.where(half == 0, scores_1 + row * n_keys, scores_2 + row * n_keys)
    tops = tl.full([2, K], last, tl.int64)
    for start in range(0, n_keys, BLOCK):
        key = start + at
        real = key < n_keys
        values = tl.load(halves + key, mask=real, other=0).to(tl.float32)
        tops = merge(tops, tl.topk(pack(values, key, real), K))
    tops, places = unpack(tops)

    best = tl.full([1, K], last, tl.int64)
    for start in range(0, n_pairs, BLOCK):
        pair = start + at
        rank = tl.load(ranks + half * n_pairs + pair, mask=pair < n_pairs, other=0)
        sums = tl.sum(tl.gather(tops, rank, 1), 0, keep_dims=True)
        best = merge(best, tl.topk(pack(sums, pair, pair < n_pairs), K))
    sums, pair = unpack(best)

    out = tl.arange(0, K)[None, :]
    rank = tl.load(ranks + half * n_pairs + pair, mask=out < k, other=0)
    place = tl.gather(places, rank, 1).to(tl.int64)
    index = tl.sum(tl.where(half == 0, place * n_keys, place), 0, keep_dims=True)
    tl.store(scores + row * k + out, sums, mask=out < k)
    tl.store(indices + row * k + out, index, mask=out < k)


@triton.jit
def backward_kernel(
    grads,  # (rows, k): gradient of the scores
    indices,  # (rows, k) int64
    grads_1,  # (rows, n_keys), out: zero except for what is written here
    grads_2,  # (rows, n_keys), out
    n_keys: tl.constexpr,
    k: tl.constexpr,
    K: tl.constexpr,  # k raised to a power of two
):
    """A key may stand in several of the k sums. Each of them adds up the gradients of all, in order of rank, and
    all write the same bits."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, K)
    index = tl.load(indices + row * k + rank, mask=rank < k, other=0).to(tl.int32)
    i, j = index // n_keys, index % n_keys
    total_1, total_2 = tl.zeros([K], tl.float32), tl.zeros([K], tl.float32)
    for other in range(k):
        grad = tl.load(grads + row * k + other).to(tl.float32)
        place = tl.load(indices + row * k + other).to(tl.int32)
        total_1 += tl.where(i == place // n_keys, grad, 0.0)
        total_2 += tl.where(j == place % n_keys, grad, 0.0)
    tl.store(grads_1 + row * n_keys + i, total_1, mask=rank < k)
    tl.store(grads_2 + row * n_keys + j, total_2, mask=rank < k)


@lru_cache
def pairs(k: int, device: torch.device) -> Tensor:
    """(2, n_pairs) int32: the ranks (i, j) in the two sorted halves whose sum can be among the k best."""
    chosen = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    return torch.tensor(chosen, dtype=torch.int32).T.contiguous().to(device)


def launch(k: int) -> dict[str, int]:
    """What the forward kernel is launched with; one warp holds up to 128 keys of each half without spills."""
    K = max(2, triton.next_power_of_2(k))
    return {"K": K, "BLOCK": max(64, K), "num_warps": max(1, K // 128)}


class ProductKeyTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores_1: Tensor, scores_2: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Both scores (rows, n_keys), contiguous."""
        rows, n_keys = scores_1.shape
        ranks = pairs(k, scores_1.device)
        scores = scores_1.new_empty(rows, k)
        indices = scores_1.new_empty(rows, k, dtype=torch.int64)
        if rows:
            with torch.cuda.device_of(scores_1):
                forward_kernel[(rows,)](
                    scores_1, scores_2, ranks, scores, indices, n_keys, ranks.shape[1], k, **launch(k)
                )  # fmt: skip
        ctx.save_for_backward(indices)
        ctx.n_keys = n_keys
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grads: Tensor, _) -> tuple[Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        rows, k = indices.shape
        grads_1, grads_2 = grads.new_zeros(2, rows, ctx.n_keys)
        if rows:
            with torch.cuda.device_of(grads):
                backward_kernel[(rows,)](
                    grads.contiguous(), indices, grads_1, grads_2, ctx.n_keys, k,
                    K=launch(k)["K"], num_warps=launch(k)["num_warps"],
                )  # fmt: skip
        return grads_1, grads_2, None


def product_key_topk(scores_1: Tensor, scores_2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As the reference. ValueError for float64, k above LARGEST_K and n_keys above LARGEST_N."""
    shape, n_keys = scores_1.shape[:-1], scores_1.shape[-1]
    if scores_1.dtype == torch.float64 or k > LARGEST_K or n_keys > LARGEST_N:
        raise ValueError(
            f"product_key_topk: the path 'triton' takes no float64, k up to {LARGEST_K} and n_keys up to "
            f"{LARGEST_N}; here {scores_1.dtype}, k {k} and n_keys {n_keys}. Take path='reference'"
        )
    scores, indices = ProductKeyTopK.apply(
        scores_1.reshape(-1, n_keys).contiguous(), scores_2.reshape(-1, n_keys).contiguous(), k
    )
    return scores.view(*shape, k), indices.view(*shape, k)


def compile_case(kernel: triton.JITFunction, dtype: str, k: int, n_keys: int = 1024) -> dict:
    """A case for tests/kernels/test_compile.py: what a launch with these sizes compiles."""
    options = launch(k)
    num_warps = options.pop("num_warps")
    n_pairs = sum(k // (i + 1) for i in range(k))
    f, i = f"*{dtype}", "*i64"
    pointers = {"scores": f, "scores_1": f, "scores_2": f, "grads": f, "grads_1": f, "grads_2": f}
    pointers |= {"indices": i, "ranks": "*i32"}
    sizes = {"n_keys": n_keys, "n_pairs": n_pairs, "k": k, **options}
    constexprs = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    return {
        "name": f"{kernel.__name__}_{dtype}_k{k}",
        "kernel": kernel,
        "signature": {name: pointers.get(name, "constexpr") for name in kernel.arg_names},
        "constexprs": constexprs,
        "num_warps": num_warps,
    }


COMPILE_CASES = [
    compile_case(forward_kernel, "bf16", 32),
    compile_case(forward_kernel, "fp32", 32),
    compile_case(forward_kernel, "bf16", 128),
    compile_case(backward_kernel, "bf16", 32),
    compile_case(backward_kernel, "fp32", 32),
]
