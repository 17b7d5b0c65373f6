"""A product-key memory layer beside its peers, and the lookup alone beside `nn.EmbeddingBag`.

    OMP_NUM_THREADS=1 memlayers bench product_key --output eval/speed/results/product_key_cpu.json

`layers`: width 512, 4 heads, 256² slots of width 512, top-k 32, 4 × 256 tokens, float32, forward and backward to
input, keys and table, all arms in every round. Ours is plain Memory (no gate, softmax), so that its work is that of
the others; `row-sparse` differs in the table's gradient alone. `F.embedding_bag` is the layer one would write: the
same queries and keys, all k² sums, and PyTorch's bag. `product-key-memory` and `PEER-pytorch` are the packages from
PyPI with the same sizes; PEER reads two tables (down and up) by design.

`lookup`: the weighted sum of rows alone, forward, and forward with backward. On a GPU at the size of
Memory Layers at Scale (bf16, 1,048,576 rows of 1,024; 4,096 tokens × 4 × 32 reads), with the share of the bandwidth
of a copy measured in the same run; on a CPU at the size of the layers above.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import memlayers as ml
from memlayers.eval.speed.timing import installed, percentiles, time_rounds, where
from memlayers.kernels.weighted_gather import weighted_gather

OURS = "memlayers"
PEERS = ("product-key-memory", "PEER-pytorch")


class EmbeddingBagLayer(ml.ProductKeyMemory):
    """The same layer as one would write it: all k² sums, and PyTorch's embedding bag."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config, n_keys = self.config, self.config.n_keys
        query = self.query(x).unflatten(-1, (config.heads, 2, config.key_dim // 2))
        scores = torch.einsum("...hpd,hpnd->p...hn", query, self.keys)
        (best_1, best_2), (index_1, index_2) = scores.topk(config.top_k, dim=-1)
        sums = (best_1[..., :, None] + best_2[..., None, :]).flatten(-2)
        slots = (index_1[..., :, None] * n_keys + index_2[..., None, :]).flatten(-2)
        best, places = sums.topk(config.top_k, dim=-1)
        slots, weights = slots.gather(-1, places).flatten(-2), best.softmax(-1).flatten(-2)
        bags = F.embedding_bag(
            slots.flatten(0, -2), self.values, per_sample_weights=weights.flatten(0, -2), mode="sum"
        )
        return bags.view(*x.shape)


def layers(width: int, n_keys: int, heads: int, top_k: int, device: str) -> dict[str, nn.Module]:
    """The layers that are compared, by name; a peer that is not installed is left out."""
    config = ml.ProductKeyMemoryConfig(
        n_keys=n_keys,
        heads=heads,
        top_k=top_k,
        key_dim=2 * (width // heads),
        qk_norm=False,
        gate="none",
        value_proj=False,
        placement="replace",
    )
    torch.manual_seed(0)
    arms = {OURS: ml.ProductKeyMemory(config, width)}
    arms[f"{OURS}, row-sparse"] = ml.ProductKeyMemory(config, width)
    arms[f"{OURS}, row-sparse"].sparse = True
    arms["F.embedding_bag"] = EmbeddingBagLayer(config, width)
    try:
        from product_key_memory import PKM

        arms[PEERS[0]] = PKM(width, heads=heads, num_keys=n_keys, topk=top_k, dim_head=width // heads)
    except ImportError:
        pass
    try:
        from PEER_pytorch import PEER

        arms[PEERS[1]] = PEER(
            width,
            heads=heads,
            num_experts=n_keys**2,
            num_experts_per_head=top_k,
            product_key_topk=top_k,
            dim_key=width // heads,
            non_competing_scores=False,
        )
    except ImportError:
        pass
    return {name: layer.to(device) for name, layer in arms.items()}


def compare_layers(
    rounds: int, device: str, width=512, n_keys=256, heads=4, top_k=32, batch=4, length=256
) -> dict:
    """Forward and backward of every layer: milliseconds, and every peer's time over ours in the same round."""
    x = torch.randn(batch, length, width, device=device)
    direction = torch.randn_like(x)

    def run(layer: nn.Module) -> Callable[[], None]:
        def once():
            layer.zero_grad(set_to_none=True)
            given = x.clone().requires_grad_()
            layer(given).backward(direction)

        return once

    arms = {name: run(layer) for name, layer in layers(width, n_keys, heads, top_k, device).items()}
    seconds = time_rounds(arms, rounds)
    return {
        "work": f"width {width}, {heads} heads, {n_keys}² slots, top-k {top_k}, {batch} × {length} tokens, "
        "forward and backward, float32",
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        "times ours": {name: percentiles(found / seconds[OURS]) for name, found in seconds.items()},
    }


def compare_lookup(rounds: int, device: str) -> dict:
    """The weighted gather alone beside `F.embedding_bag`; on a GPU beside a copy too."""
    gpu = device.startswith("cuda")
    n_rows, width, tokens, dtype = (
        (2**20, 1024, 4096, torch.bfloat16) if gpu else (2**16, 512, 1024, torch.float32)
    )
    reads = 4 * 32
    table = torch.randn(n_rows, width, device=device, dtype=dtype).requires_grad_()
    indices = torch.randint(n_rows, (tokens, reads), device=device)
    weights = torch.rand(tokens, reads, device=device, dtype=dtype).requires_grad_()
    direction = torch.randn(tokens, width, device=device, dtype=dtype)

    def ours(sparse: bool = False) -> torch.Tensor:
        return weighted_gather(table, indices, weights, sparse=sparse)

    def bag() -> torch.Tensor:
        return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def once():
            table.grad = weights.grad = None
            forward().backward(direction)

        return once

    arms = {
        f"{OURS}: forward": lambda: ours().detach(),
        "F.embedding_bag: forward": lambda: bag().detach(),
        f"{OURS}: forward and backward": both(ours),
        f"{OURS}, row-sparse: forward and backward": both(lambda: ours(sparse=True)),
        "F.embedding_bag: forward and backward": both(bag),
    }
    if gpu:
        source = torch.randn(tokens * reads, width, device=device, dtype=dtype)
        target = torch.empty_like(source)
        arms["copy"] = lambda: target.copy_(source)
    seconds = time_rounds(arms, rounds)
    report = {
        "work": f"{n_rows:,} rows of {width}, {tokens:,} tokens × {reads} reads, {dtype}",
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        "embedding_bag over ours": {
            part: percentiles(seconds[f"F.embedding_bag: {part}"] / seconds[f"{OURS}: {part}"])
            for part in ("forward", "forward and backward")
        },
    }
    if gpu:
        moved = tokens * reads * width * dtype.itemsize
        bandwidth = {
            "lookup": moved / seconds[f"{OURS}: forward"],
            "copy": 2 * moved / seconds["copy"],  # it reads and writes
        }
        report["TB/s"] = {name: percentiles(found / 1e12) for name, found in bandwidth.items()}
        report["lookup over copy"] = percentiles(bandwidth["lookup"] / np.median(bandwidth["copy"]))
    return report


def benchmark(rounds: int = 20, device: str = "cpu") -> dict:
    """All of it, as the JSON that is committed."""
    there = [peer for peer in PEERS if installed(peer)]
    return {
        "layers": compare_layers(rounds, device),
        "lookup": compare_lookup(rounds, device),
        **where(device, *there),
        "not installed": sorted(set(PEERS) - set(there)),
    }
