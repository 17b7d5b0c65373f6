"""Which slots are read: what a product-key memory uses of itself, and what lies dead.

with track_usage(model) as usage:
    model(**batch)
usage["facts.layers.4"].summary()["slots_used"]
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..files import write_whole
from ..model import decoder_of
from .module import ProductKeyMemory
from .patch import product_key_memories


class SlotUsage:
    """Reads of the slots and keys of one layer, counted on its device without waiting for it.

    Attributes:
        reads: (n_slots,) int64, how often each slot was read.
        weights: (n_slots,) float64, the sum of the weights it was read with.
        keys: (heads, 2, n_keys) int64, how often each key was part of a slot that was read.
    """

    def __init__(self, memory: ProductKeyMemory):
        self.heads, self.n_keys = memory.config.heads, memory.config.n_keys
        device = memory.keys.device
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


@contextlib.contextmanager
def track_usage(model: nn.Module) -> Iterator[dict[str, SlotUsage]]:
    """Count the reads of all product-key memories of `model` while the context lasts.

    Padding, by the attention_mask of each call, does not count. Where memory tokens cut a text in segments,
    every position counts, as the layers see it. Under gradient checkpointing the layers run twice and so do
    the counts; shares stay what they are.

    Yields:
        `name.layers.number` → its `SlotUsage`.
    """
    usage, mask = {}, _Mask()
    handle = decoder_of(model).register_forward_pre_hook(mask, with_kwargs=True)
    observers = []
    for name, memory in product_key_memories(model).items():
        for number, layer in memory.layers.items():
            usage[f"{name}.layers.{number}"] = counter = SlotUsage(layer)
            observers.append((layer, _Observer(counter, mask)))
    try:
        for layer, observer in observers:
            layer.observers.append(observer)
        yield usage
    finally:
        handle.remove()
        for layer, observer in observers:
            layer.observers.remove(observer)


class _Mask:
    """A pre-hook of the decoder that keeps the mask (batch, tokens) of the call that runs."""

    def __init__(self):
        self.mask: torch.Tensor | None = None

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        given = kwargs.get("attention_mask")
        flat = given is not None and given.dim() == 2 and inputs is not None
        self.mask = given[:, -inputs.shape[1] :].bool() if flat else None


class _Observer:
    def __init__(self, counter: SlotUsage, mask: _Mask):
        self.counter, self.mask = counter, mask

    def __call__(self, indices: torch.Tensor, weights: torch.Tensor) -> None:
        mask = self.mask.mask
        fits = mask is not None and mask.shape == indices.shape[:-1]
        self.counter.add(indices, weights, mask if fits else None)


def reads_of_tables(model: nn.Module, usage: dict[str, SlotUsage]) -> dict[str, torch.Tensor]:
    """Reads (n_slots,) int64 of each value table, by its name in the model's state dict; where layers share one,
    the sum over them."""
    reads: dict[str, torch.Tensor] = {}
    for name, memory in product_key_memories(model).items():
        for number in memory.layers:
            own = f"memlayers.{name}.layers.{number}.values"
            table = own if memory.values is None else f"memlayers.{name}.values"
            new = usage[f"{name}.layers.{number}"].reads
            reads[table] = reads[table] + new if table in reads else new.clone()
    return reads


def draw_usage(usage: dict[str, SlotUsage], path: str | Path) -> None:
    """A picture: the share of all reads that each slot gets, by rank, and the Lorenz curve, a line a layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_rank, lorenz = figure.subplots(1, 2)
    for name, counter in usage.items():
        figures, n = counter.summary(), len(counter.reads)
        share = (counter.reads.sort(descending=True).values.double() / counter.reads.sum().clamp(min=1)).cpu()
        used = share[share > 0]
        by_rank.plot(
            range(1, len(used) + 1), used, label=f"{name}: {figures['slots_used']:.0%} of {n:,} used"
        )
        lorenz.plot(
            torch.linspace(0, 1, n), share.flip(0).cumsum(0), label=f"{name}: Gini {figures['gini']:.2f}"
        )
    by_rank.axhline(1 / n, color="grey", linestyle=":", label="even use")
    lorenz.plot([0, 1], [0, 1], color="grey", linestyle=":", label="even use")
    by_rank.set(xscale="log", yscale="log", xlabel="slot, by rank", ylabel="share of all reads")
    lorenz.set(xlabel="share of the slots, least read first", ylabel="share of all reads")
    for axes in (by_rank, lorenz):
        axes.legend(fontsize=8)
    write_whole(Path(path), lambda target: figure.savefig(target, format="png", dpi=120))
