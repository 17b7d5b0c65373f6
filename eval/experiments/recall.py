"""Recall of keys from generated texts: passkeys, needles and fact updates, over lengths and depths.

Every arm and every control answers the same questions, greedily; right is the first span of the expected type, exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from memlayers.config import Strict
from memlayers.eval.experiment import Experiment, Gains, Heatmap, Lines, Progress, Record, Table, Unique
from memlayers.eval.models import ARMS, CONTROLS, Control, ModelConfig, from_checkpoint, window_of
from memlayers.eval.plan import INDICES_PER_LENGTH, Answers, Items, ask_all, check_kept
from memlayers.eval.scoring import exact, substring
from memlayers.eval.statistics import Mean, Share
from memlayers.limits import Count, Tokens
from memlayers.limits import Share as Fraction
from memlayers.tasks import HaystackConfig, Question, Sample, make_task, rng_for
from memlayers.tasks.words import ADJECTIVES, NOUNS

Condition = Literal["full_context", "sliding_window", "memory_only"]


class SuiteConfig(Strict):
    """A task, and the grid of lengths and depths it is asked on.

    Attributes:
        task: block of `memlayers.tasks` with `type: passkey`, `needle` or `updates`.
        lengths: tokens of context, question and answer.
        windows: in place of lengths, multiples of the tokens attention can reach.
        depths: 0 = start of the context, 1 = end.
        n: questions at each length, spread evenly over the depths.
        conditions: how the text is given: full_context, all in attention; sliding_window, one stream through a limited
            window; memory_only, written to memory, then asked with nothing but the memory.
    """

    task: HaystackConfig
    lengths: Annotated[list[Tokens], Unique] | None = Field(None, min_length=1)
    windows: Annotated[list[Tokens], Unique] | None = Field(None, min_length=1)
    depths: Annotated[list[Fraction], Unique] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    n: Count = 200
    conditions: Annotated[list[Condition], Unique] = Field(
        ["full_context", "sliding_window", "memory_only"], min_length=1
    )

    @model_validator(mode="after")
    def _check(self) -> SuiteConfig:
        if (self.lengths is None) == (self.windows is None):
            raise ValueError(
                "lengths: give either lengths (tokens) or windows (multiples of the window), not both"
            )
        return self


class RecallConfig(ModelConfig):
    """What is measured.

    Attributes:
        suites: name in the report to the task and its grid.
        controls: what must not be answered: the text without its needle, the state of another text, a zeroed state, the
            question alone.
    """

    experiment: Literal["recall"] = "recall"
    suites: dict[str, SuiteConfig] = Field(min_length=1)
    controls: Annotated[list[Control], Unique] = Field(list(CONTROLS))


def measure(config: RecallConfig, models, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a question, arm and condition."""
    trained, tokenizer = models.trained(), models.tokenizer()
    window = window_of(config, trained)
    cells = [
        items
        for name, suite in config.suites.items()
        for items in make_items(name, suite, tokenizer, window, seed)
    ]
    for answers in ask_all(config, models, trained, window, cells, progress):
        yield from _records(answers, config.suites[answers.items.keys["suite"]], tokenizer)


def make_items(name: str, suite: SuiteConfig, tokenizer, window: int, seed: int) -> list[Items]:
    """The items of `suite` for each of its lengths, drawn from the streams of evaluation.

    window: tokens attention can reach, for lengths given in windows. A length too short for the items gives
    `Items` with `not_run`. Raises `ValueError` when the tokenizer cannot spell the needles.
    """
    task = make_task(suite.task, tokenizer, split="eval")
    lengths = suite.lengths if suite.lengths is not None else [count * window for count in suite.windows]
    return [_at_length(task, name, suite, length, seed) for length in lengths]


def _at_length(task, name: str, suite: SuiteConfig, length: int, seed: int) -> Items:
    n_texts = math.ceil(suite.n / getattr(suite.task, "n_questions", 1))
    check_kept(n_texts, length)
    samples, empty, keys = [], [], {"suite": name}
    for index in range(n_texts):
        depth, stream = suite.depths[index % len(suite.depths)], length * INDICES_PER_LENGTH + index
        try:
            samples.append(task.sample(rng_for("eval", seed, stream), length, depth))
            empty.append(task.sample(rng_for("eval", seed, stream), length, depth, needle=False))
        except ValueError as error:
            return Items(keys, suite.conditions, length, not_run=str(error))
    return Items(keys, suite.conditions, length, samples, empty)


def _records(answers: Answers, suite: SuiteConfig, tokenizer) -> Iterator[Record]:
    items, arm = answers.items, answers.arm
    at = {**items.keys, "condition": answers.condition, "length": items.length, "arm": arm}
    if answers.not_run is not None:
        yield {**at, "not_run": answers.not_run}
        return
    at |= {"chance": chance(suite.task)}
    at |= {} if answers.state_bytes is None else {"state_bytes": answers.state_bytes}
    for number, (sample, texts) in enumerate(zip(items.samples, answers.predictions)):
        another = items.samples[(number + 1) % len(items.samples)]
        depths = _depths(suite.depths, number, sample)
        for item, (question, text, depth) in enumerate(zip(sample.questions, texts, depths)):
            outdated = [*_earlier(sample, question, tokenizer), *another.questions[0].answers]
            yield {
                **at,
                "depth": depth,
                "unit": number,
                "item": item,
                "question": tokenizer.decode(question.ids),
                "prediction": text,
                "answers": list(question.answers),
                "correct": exact(text, question.answers, question.kind),
                "substring": substring(text, question.answers),
                "stale": not exact(text, question.answers, question.kind)
                and any(exact(text, [each], question.kind) for each in outdated),
            }


def _depths(grid: Sequence[float], number: int, sample: Sample) -> list[float]:
    """The place in the grid of each question's needle: the first stands where it was put, the others where they fell."""
    others = [min(grid, key=lambda depth, at=at: abs(depth - at)) for at in sample.depths[1:]]
    return [grid[number % len(grid)], *others]


def _earlier(sample: Sample, question: Question, tokenizer) -> list[str]:
    """What the context said before of the same fact, in fact updates."""
    if question.kind != "object":
        return []
    prompt = tokenizer.decode(question.ids).rsplit(".", 1)[-1]
    values = re.findall(re.escape(prompt) + r" (\w+)", tokenizer.decode(sample.context))
    return [value for value in values if value not in question.answers]


def chance(task: HaystackConfig) -> float:
    """The share that a guess among all answers gets right; of the keys, one in five belongs to evaluation."""
    if task.type == "updates":
        return 1 / task.n_objects
    kind = getattr(task, "value_type", None) or task.key_type
    sizes = {
        "number": 9 * 10 ** (task.digits - 1),
        "word": len({*ADJECTIVES}) * len({*NOUNS}),
        "uuid": 2**122,
    }
    return min(1.0, 5 / sizes[kind])


AT = ("suite", "condition")
EXPERIMENT = Experiment(
    title="What a model remembers",
    about="Exact match of the first span of the expected type. Lengths count context, question and answer in tokens of the "
    "model's tokenizer; full_context: all in attention; sliding_window: one stream, attention limited to the window; "
    "memory_only: written to memory, keys and values dropped, then asked.",
    config=RecallConfig,
    run=from_checkpoint(measure),
    measure=measure,
    keys=("suite", "condition", "length", "arm"),
    unit="haystack",
    metrics=(
        Share("correct", "accuracy"),
        Mean("substring", "substring score"),
        Share("stale", "stale"),
        Mean("state_bytes", "bytes of state", digits=0),
    ),
    controls=CONTROLS,
    views=(
        Table(
            title="{suite}, {condition}",
            by=AT,
            rows=("length",),
            cols="arm",
            metrics=("accuracy",),
            where={"arm": ARMS},
        ),
        Table(
            title="{suite}, {condition}: controls",
            text="Share answered with a key that should not be known.",
            by=AT,
            rows=("length",),
            cols="arm",
            metrics=("accuracy",),
            where={"arm": CONTROLS},
        ),
        Gains(
            title="{suite}, {condition}: gain of the memory over base_truncated",
            by=AT,
            rows=("length",),
            of=("trained",),
            over="base_truncated",
            metrics=("accuracy",),
        ),
        Table(
            title="{suite}: the trained model in other figures",
            text="Substring: RULER's score. Stale: answered with what was right before an update, or with the answer of the next "
            "haystack.",
            by=("suite",),
            rows=("condition", "length"),
            metrics=("substring score", "stale", "bytes of state"),
            where={"arm": ("trained",)},
        ),
        Heatmap(
            title="{suite}: accuracy over length and depth",
            file="{suite}",
            by=("suite",),
            panels=("condition", "arm"),
            x="length",
            y="depth",
            metrics=("accuracy",),
            where={"arm": ("base_truncated", "trained")},
        ),
        Lines(
            title="{suite}: accuracy over length",
            file="{suite}_length",
            by=("suite",),
            panels=("condition",),
            x="length",
            hue="arm",
            metrics=("accuracy",),
            where={"arm": ARMS},
        ),
    ),
)
