"""Figures and their intervals over the same items: the only place that computes one. Everything rests on `scipy.stats`.

A metric turns the records of one cell into an estimate `{value, low, high, n, units}` with a 95 % interval. Records of one
unit (a haystack, a document, a fact) go together, so intervals are those of the units and not of the records.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MOST_DRAWN = 10_000_000
"""Clusters that are drawn at a time: 80 MB of numbers."""


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share. Raises `ValueError` for n = 0."""
    if n <= 0:
        raise ValueError("an interval needs at least one item.")
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    counts: Sequence[float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of Σ values / Σ counts; whole clusters are drawn, since items of one context go together.

    Args:
        values: one an item, such as the difference of two arms.
        clusters: the context each item belongs to.
        counts: what each item counts in the denominator; default: 1, so that the interval is that of the mean.

    Returns None with fewer than two clusters: one context says nothing about others.

    Raises:
        ValueError: the lists differ in length.
    """
    counts = [1.0] * len(values) if counts is None else counts
    if not len(values) == len(clusters) == len(counts):
        raise ValueError(
            f"{len(values)} values, {len(counts)} counts but {len(clusters)} clusters: one cluster an item is needed."
        )
    tops: dict[Hashable, float] = {}
    bottoms: dict[Hashable, float] = {}
    for value, count, cluster in zip(values, counts, clusters):
        tops[cluster] = tops.get(cluster, 0.0) + float(value)
        bottoms[cluster] = bottoms.get(cluster, 0.0) + float(count)
    if len(tops) < 2:
        return None
    top, bottom = np.array(list(tops.values())), np.array(list(bottoms.values()))
    if np.all(bottom != 0) and np.all(top / bottom == top[0] / bottom[0]):  # nothing varies
        return float(top[0] / bottom[0]), float(top[0] / bottom[0])
    result = stats.bootstrap(
        (top, bottom),
        lambda x, y, axis=-1: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, MOST_DRAWN // len(top)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar test that two arms are right equally often on the same items (McNemar 1947).

    Returns the p-value; 1.0 where the arms never differ. Raises `ValueError` for lists of different length.
    """
    if len(first) != len(second):
        raise ValueError(f"the arms must answer the same items, got {len(first)} and {len(second)}.")
    only_first = sum(bool(a) and not b for a, b in zip(first, second))
    only_second = sum(bool(b) and not a for a, b in zip(first, second))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def above_chance(successes: int, n: int, chance: float) -> float:
    """The p-value of so many right answers among n from guessing alone (exact binomial test, one-sided)."""
    return float(stats.binomtest(successes, n, chance, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


@dataclass(frozen=True)
class Mean:
    """The mean of a field of the records, with a bootstrap over units.

    Attributes:
        field: of the records; those that lack it do not count.
        name: in tables and pictures.
        of: a field to divide the sum by, in place of the number of records.
        digits: behind the point, in tables.
    """

    field: str
    name: str
    of: str | None = None
    digits: int = 3

    def estimate(self, rows, resamples: int, seed: int) -> dict:
        """`{value, low, high, n, units}` of a DataFrame of records with a column `cluster`; low and high are None where
        all records are of one unit."""
        values = rows[self.field].astype(float).tolist()
        counts = [1.0] * len(values) if self.of is None else rows[self.of].astype(float).tolist()
        value, clusters = sum(values) / sum(counts) if sum(counts) else 0.0, rows["cluster"].tolist()
        n, units = round(sum(counts)) if isinstance(self, Share) else len(values), len(set(clusters))
        low, high = self.interval(value, units, values, clusters, counts, resamples, seed) or (None, None)
        return {
            "value": self.shown(value),
            "low": self.shown(low),
            "high": self.shown(high),
            "n": n,
            "units": units,
        }

    def interval(self, value, units, values, clusters, counts, resamples, seed) -> tuple[float, float] | None:
        """The 95 % interval of the value."""
        return cluster_bootstrap(values, clusters, counts, resamples=resamples, seed=seed)

    def shown(self, value: float | None) -> float | None:
        """The value on the scale of the report."""
        return value


@dataclass(frozen=True)
class Share(Mean):
    """The share that is right, with Wilson's interval for as many items as there are units."""

    field: str = "correct"
    name: str = "accuracy"

    def interval(self, value, units, values, clusters, counts, resamples, seed) -> tuple[float, float]:
        return wilson(round(value * units), units)


@dataclass(frozen=True)
class Perplexity(Mean):
    """exp of the mean of a loss in nats, with a bootstrap over units."""

    field: str = "loss"
    name: str = "perplexity"
    digits: int = 2

    def shown(self, value: float | None) -> float | None:
        return None if value is None else math.exp(value)


def gain(first, second, field: str, resamples: int, seed: int) -> dict:
    """What one arm has more than another on the same items: {n, value, low, high, p}; `p` only where items are right or not.

    Args:
        first, second: records of two arms, one a line in the same order, with columns `field` and `cluster`.
    """
    a, b = first[field].tolist(), second[field].tolist()
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    clusters = first["cluster"].tolist()
    low, high = cluster_bootstrap(differences, clusters, resamples=resamples, seed=seed) or (None, None)
    found = {"value": sum(differences) / len(differences), "low": low, "high": high}
    found |= {"n": len(differences), "units": len(set(clusters))}
    if {*a, *b} <= {0, 1}:
        found["p"] = mcnemar(a, b)
    return found
