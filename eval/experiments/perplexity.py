"""Perplexity on unseen prose: what the memory, and training for it, did to the language model.

All arms predict the same tokens: every token of a sequence that is not the first of a window. `base` sees the
whole sequence, `base_truncated` and `memory_disabled` only the window a token stands in, `trained` and `untrained` read
the sequence in segments with memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

import memlayers as ml
from memlayers.core.model import max_positions, reach
from memlayers.eval.experiment import Bars, Experiment, Gains, Progress, Record, Table
from memlayers.eval.models import ARMS, ModelConfig, from_checkpoint, stages, window_of
from memlayers.eval.probes import token_losses
from memlayers.eval.statistics import Mean, Perplexity
from memlayers.eval.texts import ProseConfig, unseen_prose

ARMS_OF = {
    "trained": ("memory_disabled", "trained"),
    "base": ("base", "base_truncated"),
    "untrained": ("untrained",),
}
"""Stage (which model) -> arms measured on it."""


class PerplexityConfig(ModelConfig):
    """What is measured; `prose` is the text."""

    experiment: Literal["perplexity"] = "perplexity"
    prose: ProseConfig


def measure(config: PerplexityConfig, models, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a sequence and arm, of the mean loss of its tokens that do not open a window."""
    trained = models.trained()
    window = window_of(config, trained)
    sequences = unseen_prose(config.prose, models.tokenizer(), window)
    for stage, reason in models.missing.items():
        yield from ({"arm": arm, "not_run": reason} for arm in ARMS_OF[stage] if arm in config.arms)
    bar = progress(total=len(sequences) * len(config.arms), desc="sequences", unit="sequence")
    for stage, model in stages(models, trained=trained):
        limit = max_positions(model.eval())
        for arm in (arm for arm in ARMS_OF[stage] if arm in config.arms):
            cut = arm in ("base_truncated", "memory_disabled")
            if not cut and reach(model) is None and limit is not None and sequences.shape[1] > limit:
                reason = f"{sequences.shape[1]} tokens are more than the model's {limit} positions"
                yield {"arm": arm, "not_run": reason}
                continue
            for start in range(0, len(sequences), config.batch_size):
                rows = sequences[start : start + config.batch_size].to(model.device)
                for number, mean in enumerate(_means(model, arm, rows, window, cut), start=start):
                    yield {
                        "arm": arm,
                        "unit": number,
                        "loss": mean,
                        "tokens": rows.shape[1] - rows.shape[1] // window,
                    }
                bar.update(len(rows))
    bar.close()


def _means(model, arm: str, rows: torch.Tensor, window: int, cut: bool) -> list[float]:
    """The mean loss (nats) of each row (rows, windows · window), of the tokens that do not open a window."""
    ids = rows.reshape(-1, window) if cut else rows
    if arm == "memory_disabled":
        with ml.disabled(model):
            losses = token_losses(model, ids)
    else:
        losses = token_losses(model, ids)
    inside = torch.arange(1, ids.shape[1], device=ids.device) % window != 0
    return losses[:, inside].reshape(len(rows), -1).mean(1).tolist()


EXPERIMENT = Experiment(
    title="Perplexity on unseen prose",
    about="All arms predict the same tokens, those that do not open a window.",
    config=PerplexityConfig,
    run=from_checkpoint(measure),
    measure=measure,
    keys=("arm",),
    unit="sequence",
    metrics=(Perplexity(), Mean("loss", "loss"), Mean("tokens", "tokens", digits=0)),
    views=(
        Table(title="Perplexity", rows=("arm",), metrics=("perplexity", "loss"), where={"arm": ARMS}),
        Gains(
            title="Loss in nats beside the base",
            rows=(),
            over="base",
            metrics=("loss",),
            where={"arm": ARMS},
        ),
        Bars(
            title="Perplexity on unseen prose",
            file="perplexity",
            x="arm",
            metrics=("perplexity",),
            where={"arm": ARMS},
        ),
    ),
)
