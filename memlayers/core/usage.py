"""Which slots of tables are read: what a memory with tables uses of itself, and what lies dead.

with track_usage(model) as usage:
    model(**batch)
usage["facts.layers.4"].summary()["slots_used"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_whole
from .model import ROOT, decoder_of, memories


@contextlib.contextmanager
def track_usage(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Count the reads of all tables of `model` while the context lasts.

    Padding, by the attention_mask of each call, does not count. Where memory tokens cut a text in segments,
    every position counts, as the layers see it. Under gradient checkpointing the layers run twice and so do
    the counts; shares stay what they are.

    Yields:
        memory and part, as `facts.layers.4` → its counter, see `Memory.readers`.
    """
    usage, mask = {}, _Mask()
    handle = decoder_of(model).register_forward_pre_hook(mask, with_kwargs=True)
    observers = []
    for name, memory in memories(model).items():
        for part, (reader, _) in memory.readers().items():
            usage[f"{name}.{part}"] = counter = reader.new_counter()
            observers.append((reader, _Observer(counter, mask)))
    try:
        for reader, observer in observers:
            reader.observers.append(observer)
        yield usage
    finally:
        handle.remove()
        for reader, observer in observers:
            reader.observers.remove(observer)


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
    def __init__(self, counter: Any, mask: _Mask):
        self.counter, self.mask = counter, mask

    def __call__(self, indices: torch.Tensor, weights: torch.Tensor) -> None:
        mask = self.mask.mask
        fits = mask is not None and mask.shape == indices.shape[:-1]
        self.counter.add(indices, weights, mask if fits else None)


def reads_of_tables(model: nn.Module, usage: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Reads (n_slots,) int64 of each value table, by its name in the model's state dict; where layers share one,
    the sum over them."""
    reads: dict[str, torch.Tensor] = {}
    for name, memory in memories(model).items():
        for part, (_, table) in memory.readers().items():
            table, new = f"{ROOT}.{name}.{table}", usage[f"{name}.{part}"].reads
            reads[table] = reads[table] + new if table in reads else new.clone()
    return reads


def draw_usage(usage: dict[str, Any], path: str | Path) -> None:
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
