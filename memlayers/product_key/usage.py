"""`SlotUsage`: what a product-key memory uses of itself, and what lies dead."""

from __future__ import annotations

import math

import torch


class SlotUsage:
    """Reads of the slots and keys of one layer, counted on its device without waiting for it.

    Attributes:
        reads: (n_slots,) int64, how often each slot was read.
        weights: (n_slots,) float64, the sum of the weights it was read with.
        keys: (heads, 2, n_keys) int64, how often each key was part of a slot that was read.
    """

    def __init__(self, heads: int, n_keys: int, device: torch.device):
        self.heads, self.n_keys = heads, n_keys
        self.reads = torch.zeros(self.n_keys**2, dtype=torch.int64, device=device)
        self.weights = torch.zeros(self.n_keys**2, dtype=torch.float64, device=device)
        self.keys = torch.zeros(self.heads, 2, self.n_keys, dtype=torch.int64, device=device)

    def add(self, indices: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Count one call.

        Args:
            indices: (..., heads · top_k) int64 and weights of the same shape, as `ProductKeyMemory.lookup` gives.
            mask: (...) bool, tokens that count; None: all.
        """
        counted = torch.ones_like(indices) if mask is None else mask[..., None].expand_as(indices).long()
        by_head = indices.unflatten(-1, (self.heads, -1))
        head = torch.arange(self.heads, device=indices.device)[:, None]
        for half, key in enumerate((by_head // self.n_keys, by_head % self.n_keys)):
            place = (head * 2 + half) * self.n_keys + key
            self.keys.view(-1).index_add_(0, place.flatten(), counted.flatten())
        self.reads.index_add_(0, indices.flatten(), counted.flatten())
        self.weights.index_add_(0, indices.flatten(), (weights * counted).flatten().double())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The counts by name, themselves and no copies."""
        return {"reads": self.reads, "weights": self.weights, "keys": self.keys}

    def clear(self) -> None:
        """Start counting anew."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def merge(self) -> None:
        """Add up the counts of all processes, where there are several; every process has the sum then."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in self.tensors().values():
                torch.distributed.all_reduce(tensor)

    def summary(self) -> dict[str, float]:
        """Figures between 0 (nothing used, or all alike) and their limits; waits for the device.

        `slots_used` and `keys_dead`: shares. Then, of the reads and, as `weighted_…`, of their weights:
        `effective_slots`: exp of the entropy in nats, at most n_slots (2412.09764 calls it perplexity);
        `kl_from_uniform`: log n_slots − entropy, in nats; `gini`: 0 for even use, near 1 where a few slots
        get all. Without any read everything is 0 and all keys are dead.
        """
        figures = {
            "slots_used": float((self.reads > 0).double().mean()),
            "keys_dead": float((self.keys == 0).double().mean()),
        }
        figures.update(concentration(self.reads.double()))
        figures.update({f"weighted_{k}": v for k, v in concentration(self.weights).items()})
        return figures


def concentration(use: torch.Tensor) -> dict[str, float]:
    """Effective number, KL from uniform and Gini coefficient of non-negative `use` (n,)."""
    n, total = len(use), float(use.sum())
    if total == 0:
        return {"effective_slots": 0.0, "kl_from_uniform": 0.0, "gini": 0.0}
    share = use / total
    entropy = float(torch.special.entr(share).sum())
    rank = torch.arange(1, n + 1, device=use.device, dtype=use.dtype)
    gini = float((2 * rank - n - 1) @ share.sort().values) / n
    return {"effective_slots": math.exp(entropy), "kl_from_uniform": math.log(n) - entropy, "gini": gini}
