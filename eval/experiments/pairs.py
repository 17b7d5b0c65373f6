"""Associative recall (MQAR): the share of queries answered over the number of pairs and the length.

Each row has its own keys and values; the answers are read from one call, see `probes.TokenProber`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from memlayers.config import ConfigError
from memlayers.eval.experiment import Experiment, Gains, Lines, Progress, Record, Table, Unique
from memlayers.eval.experiments.recall import Condition
from memlayers.eval.models import ARMS, CONTROLS, Control, ModelConfig, from_checkpoint, window_of
from memlayers.eval.plan import INDICES_PER_LENGTH, Answers, Items, ask_all, check_kept
from memlayers.eval.probes import TokenProber
from memlayers.eval.statistics import Mean, Share
from memlayers.limits import Count, Tokens
from memlayers.tasks import MqarConfig, MqarTask, Sample, rng_for


class PairsConfig(ModelConfig):
    """What is measured.

    Attributes:
        task: block of `memlayers.tasks` with `type: mqar`, without its number of pairs.
        n_pairs: those to ask.
        lengths: tokens of pairs and queries, each with every number of pairs; None: for each number of pairs the one
            length that `task.tokens_per_pair` gives it.
        n: rows in a cell, each with all its queries.
        conditions, controls: as in recall.
    """

    experiment: Literal["pairs"] = "pairs"
    task: MqarConfig = MqarConfig()
    n_pairs: Annotated[list[Count], Unique] = Field(min_length=1)
    lengths: Annotated[list[Tokens], Unique] | None = Field(None, min_length=1)
    n: Count = 200
    conditions: Annotated[list[Condition], Unique] = Field(
        ["full_context", "sliding_window", "memory_only"], min_length=1
    )
    controls: Annotated[list[Control], Unique] = Field(list(CONTROLS))

    @model_validator(mode="after")
    def _check(self) -> PairsConfig:
        if self.task.n_pairs is not None:
            raise ConfigError("task.n_pairs: the experiment's own n_pairs says how many; take this one out")
        if self.lengths is not None and self.task.tokens_per_pair is not None:
            raise ConfigError("lengths: give lengths or task.tokens_per_pair, not both")
        return self


def measure(config: PairsConfig, models, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a row, arm and condition. Raises `ConfigError` for token ids that the model has no embedding for."""
    trained, tokenizer = models.trained(), models.tokenizer()
    window = window_of(config, trained)
    task = MqarTask(config.task, tokenizer, split="eval")
    task.check_embeddings(trained.get_input_embeddings().weight.shape[0], "task")
    cells = [
        make_items(config, tokenizer, n_pairs, length, seed)
        for n_pairs in sorted(config.n_pairs)
        for length in sorted(config.lengths or [task.length_for(n_pairs)])
    ]
    for answers in ask_all(config, models, trained, window, cells, progress, TokenProber):
        yield from _records(answers, task.chance)


def make_items(config: PairsConfig, tokenizer, n_pairs: int, length: int, seed: int) -> Items:
    """`n` rows and the same without what is asked for; none, with the reason, where they do not fit."""
    task = MqarTask(
        config.task.model_copy(update={"n_pairs": n_pairs, "tokens_per_pair": None}), tokenizer, split="eval"
    )
    first, keys = (length * INDICES_PER_LENGTH + n_pairs) * INDICES_PER_LENGTH, {"n_pairs": n_pairs}
    check_kept(config.n, length)
    samples, empty = [], []
    for index in range(first, first + config.n):
        try:
            samples.append(task.sample(rng_for("eval", seed, index), length))
            empty.append(task.sample(rng_for("eval", seed, index), length, needle=False))
        except ValueError as error:
            return Items(keys, config.conditions, length, not_run=str(error))
    return Items(keys, config.conditions, length, samples, empty)


def _records(answers: Answers, guess: float) -> Iterator[Record]:
    items = answers.items
    at = {**items.keys, "condition": answers.condition, "length": items.length, "arm": answers.arm}
    if answers.not_run is not None:
        yield {**at, "not_run": answers.not_run}
        return
    at |= {} if answers.state_bytes is None else {"state_bytes": answers.state_bytes}
    for number, (sample, predictions) in enumerate(zip(items.samples, answers.predictions)):
        true, another = _answers(sample), _answers(items.samples[(number + 1) % len(items.samples)])
        right = sum(a == b for a, b in zip(predictions, true, strict=True))
        question = sample.questions[0]
        yield {
            **at,
            "unit": number,
            "keys": [question.ids[place - 1] for place in question.answer_at],
            "answers": true,
            "predictions": predictions,
            "right": right,
            "queries": len(true),
            "correct": right / len(true),
            "stale": sum(a == b != c for a, b, c in zip(predictions, another, true)) / len(true),
            "chance": 1 / max(1, round(1 / guess) - len(true)),  # a guess among the values that are not seen
        }


def _answers(sample: Sample) -> list[int]:
    question = sample.questions[0]
    return [question.ids[at] for at in question.answer_at]


EXPERIMENT = Experiment(
    title="Associative recall over the number of pairs",
    about="Share of queries whose value is the most likely token behind their key. A guess among the values of a row is right "
    "at 1 / pairs. full_context: all in attention; sliding_window: attention limited to the window; memory_only: written to "
    "memory, keys and values dropped, then asked.",
    config=PairsConfig,
    run=from_checkpoint(measure),
    measure=measure,
    keys=("condition", "n_pairs", "length", "arm"),
    unit="row",
    metrics=(
        Share("right", "accuracy", of="queries"),
        Mean("correct", "share right"),
        Mean("stale", "stale"),
        Mean("chance", "guess"),
        Mean("state_bytes", "bytes of state", digits=0),
    ),
    controls=CONTROLS,
    views=(
        Table(
            title="{condition}",
            by=("condition",),
            rows=("n_pairs", "length"),
            cols="arm",
            metrics=("accuracy",),
            where={"arm": ARMS},
        ),
        Table(
            title="{condition}: controls",
            by=("condition",),
            rows=("n_pairs", "length"),
            cols="arm",
            metrics=("accuracy",),
            where={"arm": CONTROLS},
        ),
        Gains(
            title="{condition}: gain of the memory over base_truncated",
            by=("condition",),
            rows=("n_pairs", "length"),
            of=("trained",),
            over="base_truncated",
            metrics=("share right",),
        ),
        Table(
            title="The trained model in other figures",
            text="Stale: answered with the value of the next row. Guess: share that a guess among all values gets right.",
            rows=("condition", "n_pairs", "length"),
            metrics=("stale", "guess", "bytes of state"),
            where={"arm": ("trained",)},
        ),
        Lines(
            title="Associative recall",
            file="pairs",
            panels=("condition", "length"),
            x="n_pairs",
            hue="arm",
            metrics=("accuracy",),
            where={"arm": ARMS},
        ),
    ),
)
