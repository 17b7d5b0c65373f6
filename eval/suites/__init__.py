"""Suites: which items are asked. The generators are `memlayers.tasks`; here they become lists of items per length."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memlayers.eval.config import SuiteConfig
from memlayers.tasks import Sample, make_task, rng_for

INDICES_PER_LENGTH = 1_000_000


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


def _at_length(task, suite: SuiteConfig, length: int, seed: int) -> Items:
    per_haystack = getattr(suite.task, "n_questions", 1)
    samples, empty, depths = [], [], []
    for index in range(math.ceil(suite.n / per_haystack)):
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
