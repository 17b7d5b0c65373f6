"""How much of a text a reversible memory gives back, over how far it compresses.

Every arm is a reversible memory on the same frozen base, trained on the first four fifths of a file with its
reconstruction loss alone. Of unseen segments (the last fifth) are counted the tokens that come back, and the segments that
come back whole. Beside it: the same before training, memory of another segment, and the most frequent token of the
training text. A memory with `backwards: separate` is the plain autoencoder of the same size.

With `checkpoint`, what `train/run.py` trained is measured too: the same shares, and the perplexity of the last segment of
unseen sequences after the segments before it were read into memory, stood in attention, or were not there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.compressor import CompressorTraining, train_compressor
from memlayers.eval.experiment import Experiment, ExperimentConfig, Lines, Progress, Record, Table
from memlayers.eval.models import load_plain
from memlayers.eval.probes import token_losses
from memlayers.eval.statistics import Mean, Perplexity, Share
from memlayers.eval.texts import ProseConfig, training_prose, unseen_prose
from memlayers.limits import Count
from memlayers.loading import load_tokenizer

MEMORY = "past"
CONTROLS = ("untrained", "shuffled", "most_frequent")
GIVEN = ("text", "memory", "shuffled memory", "untrained memory", "nothing")
"""What stands before the last segment of a sequence."""


class ReversibleEvalConfig(ExperimentConfig, CompressorTraining):
    """What is measured; the fields of `CompressorTraining` are those of every arm.

    Attributes:
        model: folder or hub id of a plain checkpoint, the base.
        file: a plain text file; the last fifth of its sentences is unseen.
        arms: name to memory; {}: only the checkpoint.
        n_segments: unseen segments, fewer if the text ends before.
        checkpoint: folder of a trained model with one reversible memory, `{seed}` stands for the seed; None: none.
        context_segments: read before the last segment, where perplexity is measured.
        n_sequences: for perplexity.
    """

    experiment: Literal["reversible"] = "reversible"
    model: str
    file: str
    arms: dict[str, ml.ReversibleMemoryConfig] = Field(default_factory=dict)
    n_segments: Count = Field(500, ge=2)
    checkpoint: str | None = None
    context_segments: Count = 3
    n_sequences: Count = Field(100, ge=2)

    @model_validator(mode="after")
    def _fits_together(self):
        if not self.arms and self.checkpoint is None:
            raise ConfigError("arms: nothing to measure; give arms, or a checkpoint")
        return self


def run(config: ReversibleEvalConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a segment, arm and control; of a checkpoint also one a sequence and what was given before it.

    Raises `FileNotFoundError` for a checkpoint or a text that is not there, `ValueError` for a text that is too short
    or a checkpoint without the memory that is measured.
    """
    tokenizer = load_tokenizer(config.model)
    for name, memory_config in config.arms.items():
        base = load_plain(config.model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            memory = ml.attach(base, memory_config, name=MEMORY)
        bar = functools.partial(progress, desc=f"seed {seed}, {name}")
        yield from measure_compressor(name, base, memory, config, tokenizer, seed, bar)
    if config.checkpoint is not None:
        yield from measure_checkpoint(ml.load(config.checkpoint.format(seed=seed)), tokenizer, config, seed)


def measure_compressor(name: str, base, memory, config, tokenizer, seed: int, bar) -> Iterator[Record]:
    """Train one memory and count: the trained arm and its controls."""
    length = memory.schedule.reach
    seen, unseen = training_prose(config.file, tokenizer), unseen_segments(config, tokenizer, length)
    at = {"compressor": name, "kind": kind_of(memory.config), "ratio": length / memory.config.n_tokens}
    yield from _segments(at, "untrained", right_tokens(base, memory, unseen), length)
    started = time.process_time()
    loss = train_compressor(base, memory, seen, config, seed, bar)
    seconds = time.process_time() - started
    yield from _segments(at, "trained", right_tokens(base, memory, unseen), length)
    yield from _segments(at, "shuffled", right_tokens(base, memory, unseen, shift=1), length)
    yield from _segments(at, "most_frequent", (unseen == seen.bincount().argmax()).sum(1), length)
    parameters = sum(p.numel() for p in memory.compressor.parameters())
    yield {
        **at,
        "unit": "seed",
        "segment": length,
        "parameters": parameters,
        "train_loss": loss,
        "cpu_s": seconds,
    }


def unseen_segments(config: ReversibleEvalConfig, tokenizer, length: int) -> torch.Tensor:
    """Unseen segments (n, length) of the file; raises as `unseen_prose`."""
    return unseen_prose(
        ProseConfig(file=config.file, windows=1, n_sequences=config.n_segments), tokenizer, length
    )


def kind_of(config: ml.ReversibleMemoryConfig) -> str:
    """What compresses: how it goes backwards, in how many levels."""
    return f"{config.backwards}, {len(config.ratios)} level" + "s" * (len(config.ratios) > 1)


def _segments(at: dict, arm: str, right: torch.Tensor, length: int) -> Iterator[Record]:
    for number, count in enumerate(right.tolist()):
        yield {**at, "arm": arm, "unit": number, "right": count, "tokens": length, "correct": count == length}


@torch.no_grad()
def right_tokens(model, memory, segments: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """How many tokens of each segment (n, length) come back, (n,); `shift`: each from the memory of another segment."""
    mask = torch.ones_like(segments, dtype=torch.bool)
    embeds = model.get_input_embeddings()(segments)
    state = memory.update(memory.new_state(len(segments)), None, embeds, mask)
    predictions, _ = memory.read_back(model, {name: x.roll(shift, 0) for name, x in state.items()})
    return (predictions == segments).sum(1)


@torch.no_grad()
def measure_checkpoint(model, tokenizer, config: ReversibleEvalConfig, seed: int) -> Iterator[Record]:
    """What a checkpoint gives back, and the loss of what follows on it, by what stands before."""
    found = {n: m for n, m in ml.memories(model).items() if isinstance(m, ml.ReversibleMemory)}
    if len(found) != 1:
        raise ValueError(f"checkpoint: needs one reversible memory, found {sorted(found) or 'none'}")
    (name, memory), window = *found.items(), ml.window(model)
    model.eval()
    at = {
        "compressor": "checkpoint",
        "kind": kind_of(memory.config),
        "ratio": window / memory.config.n_tokens,
    }
    yield from _segments(
        at, "trained", right_tokens(model, memory, unseen_segments(config, tokenizer, window)), window
    )
    prose = ProseConfig(file=config.file, windows=config.context_segments + 1, n_sequences=config.n_sequences)
    sequences = unseen_prose(prose, tokenizer, window)
    before, last = sequences[:, :-window], sequences[:, -window:]
    trained = ml.write(model, before)
    losses = {"memory": token_losses(model, last, memory_state=trained)}
    rolled = trained.select(torch.arange(len(last)).roll(1))
    losses["shuffled memory"] = token_losses(model, last, memory_state=rolled)
    with ml.disabled(model):
        losses["text"] = token_losses(model, sequences)[:, 1 - window :]
        losses["nothing"] = token_losses(model, last)
    fresh = ml.detach(model, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ml.attach(fresh, memory.config, name=name)
    losses["untrained memory"] = token_losses(fresh, last, memory_state=ml.write(fresh, before))
    for given in GIVEN:
        for number, loss in enumerate(losses[given].mean(1).tolist()):
            yield {"given": given, "unit": number, "loss": loss}


EXPERIMENT = Experiment(
    title="What a reversible memory gives back",
    about="Ratio: tokens of text a memory token. Shares of unseen tokens, and of unseen segments as a whole, that come back "
    "exactly. Controls: before training, from the memory of another segment, and the most frequent token of the training text.",
    config=ReversibleEvalConfig,
    run=run,
    keys=("compressor", "arm", "given"),
    unit="segment",
    metrics=(
        Mean("right", "tokens that come back", of="tokens"),
        Share("correct", "whole segments"),
        Perplexity(),
        Mean("train_loss", "training loss"),
        Mean("parameters", "parameters", digits=0),
        Mean("cpu_s", "CPU s", digits=0),
    ),
    views=(
        Table(
            title="What comes back",
            rows=("compressor", "ratio"),
            metrics=("tokens that come back", "whole segments"),
            where={"arm": ("trained",)},
        ),
        Table(
            title="Controls: tokens that come back",
            rows=("compressor",),
            cols="arm",
            metrics=("tokens that come back",),
            where={"arm": CONTROLS},
        ),
        Table(
            title="Training of the compressors",
            rows=("compressor", "segment"),
            metrics=("training loss", "parameters", "CPU s"),
        ),
        Table(
            title="Perplexity of a segment, by what stands before it",
            rows=("given",),
            metrics=("perplexity",),
            where={"given": GIVEN},
        ),
        Lines(
            title="Unseen tokens that come back",
            file="reversible",
            x="ratio",
            hue="kind",
            metrics=("tokens that come back",),
            where={"arm": ("trained",)},
        ),
    ),
)
