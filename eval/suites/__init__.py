"""Suites: which items are asked. The generators are `memlayers.tasks`; here they become lists of items per length."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memlayers.config import ConfigError
from memlayers.eval.config import SuiteConfig
from memlayers.tasks import Sample, make_task, rng_for

INDICES_PER_LENGTH = 1_000_000
MOST_KEPT = 2**28
"""Tokens of all texts of one length, which are kept while they are asked: 2 GB."""


@dataclass(frozen=True)
class Items:
    """The haystacks of one suite at one length, in a fixed order.

    samples: with their needles. empty: the same items without the needles that are asked for. depths: for
    each haystack and question, the cell of the grid. not_run: why there are none, else None.
    """

    length: int
    samples: list[Sample]
    empty: list[Sample]
    depths: list[list[float]]
    not_run: str | None = None

    @property
    def n_questions(self) -> int:
        return sum(len(sample.questions) for sample in self.samples)


def make_items(suite: SuiteConfig, tokenizer, window: int, seed: int) -> list[Items]:
    """The items of `suite` for each of its lengths, drawn from the streams of evaluation.

    window: tokens attention can reach, for lengths given in windows. A length too short for the items gives
    `Items` with `not_run`. Raises `ValueError` when the tokenizer cannot spell the needles.
    """
    task = make_task(suite.task, tokenizer, split="eval")
    lengths = suite.lengths if suite.lengths is not None else [count * window for count in suite.windows]
    return [_at_length(task, suite, length, seed) for length in lengths]


def check_kept(n_texts: int, length: int) -> None:
    """Raise ConfigError where so many texts of `length` tokens are more than MOST_KEPT."""
    if n_texts * length > MOST_KEPT:
        raise ConfigError(
            f"n: {n_texts:,} texts of {length:,} tokens are more than {MOST_KEPT:,} tokens; lower it or the lengths"
        )


def _at_length(task, suite: SuiteConfig, length: int, seed: int) -> Items:
    n_texts = math.ceil(suite.n / getattr(suite.task, "n_questions", 1))
    check_kept(n_texts, length)
    samples, empty, depths = [], [], []
    for index in range(n_texts):
        depth, stream = suite.depths[index % len(suite.depths)], length * INDICES_PER_LENGTH + index
        try:
            sample = task.sample(rng_for("eval", seed, stream), length, depth)
            samples.append(sample)
            empty.append(task.sample(rng_for("eval", seed, stream), length, depth, needle=False))
        except ValueError as error:
            return Items(length, [], [], [], not_run=str(error))
        # The first question's needle stands where it was asked to; the others are sorted into the grid.
        others = [min(suite.depths, key=lambda d, at=at: abs(d - at)) for at in sample.depths[1:]]
        depths.append([depth, *others])
    return Items(length, samples, empty, depths)
