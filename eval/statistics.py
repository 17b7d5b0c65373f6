"""Intervals and tests for accuracies over the same items. Everything rests on `scipy.stats`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

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


def paired_bootstrap(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of the mean difference; whole clusters are drawn, since items of one context go together.

    differences: one an item, arm minus arm. clusters: the context each item belongs to.
    Returns None with fewer than two clusters: one context says nothing about others.
    """
    if len(differences) != len(clusters):
        raise ValueError(
            f"{len(differences)} differences but {len(clusters)} clusters: one cluster an item is needed."
        )
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for difference, cluster in zip(differences, clusters):
        sums[cluster] = sums.get(cluster, 0.0) + float(difference)
        counts[cluster] = counts.get(cluster, 0) + 1
    if len(sums) < 2:
        return None
    totals, sizes = np.array(list(sums.values())), np.array(list(counts.values()), dtype=float)
    if np.all(totals / sizes == totals[0] / sizes[0]):  # nothing varies: the interval is the point
        return float(totals[0] / sizes[0]), float(totals[0] / sizes[0])
    result = stats.bootstrap(
        (totals, sizes),
        lambda total, size, axis=-1: total.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, MOST_DRAWN // len(totals)),
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
