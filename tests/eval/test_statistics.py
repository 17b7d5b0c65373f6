"""Statistics against published and hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memlayers.eval.statistics import cluster_bootstrap, holm, mcnemar, wilson


def by_hand(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return centre - half, centre + half


@pytest.mark.parametrize(("k", "n"), [(0, 20), (20, 20), (81, 263), (15, 148), (190, 200)])
def test_wilson_is_the_formula(k, n):
    assert wilson(k, n) == pytest.approx(by_hand(k, n), abs=1e-12)


def test_wilson_known_values():
    assert wilson(20, 20)[0] == pytest.approx(0.8389, abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_mcnemar_exact():
    first = [True] * 8 + [False] * 2 + [True] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5
    assert mcnemar(first, second) == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)
    assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar([True, False], [True, False]) == 1.0
    with pytest.raises(ValueError, match="same items"):
        mcnemar([True], [True, False])


def test_holm_known_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap_covers_the_normal_interval_for_single_items():
    rng = np.random.default_rng(0)
    differences = rng.integers(-1, 2, 400).astype(float).tolist()
    low, high = cluster_bootstrap(differences, range(400))
    half = 1.96 * np.std(differences) / math.sqrt(400)
    assert low == pytest.approx(np.mean(differences) - half, abs=0.02)
    assert high == pytest.approx(np.mean(differences) + half, abs=0.02)


def test_bootstrap_is_wider_when_items_share_a_context():
    rng = np.random.default_rng(1)
    per_context = rng.integers(0, 2, 40)
    differences = np.repeat(per_context, 10).astype(float).tolist()
    contexts = np.repeat(np.arange(40), 10).tolist()
    clustered = cluster_bootstrap(differences, contexts)
    naive = cluster_bootstrap(differences, range(400))
    assert clustered[1] - clustered[0] > 2 * (naive[1] - naive[0])
    assert clustered[1] - clustered[0] == pytest.approx(
        2 * 1.96 * np.std(per_context) / math.sqrt(40), rel=0.2
    )


def test_bootstrap_weighs_contexts_by_their_items():
    differences, contexts = [1.0] * 9 + [0.0], [0] * 9 + [1]
    low, high = cluster_bootstrap(differences, contexts)
    assert low == 0.0 and high == 1.0


def test_bootstrap_edges():
    assert cluster_bootstrap([1.0, 0.0], [5, 5]) is None
    assert cluster_bootstrap([1.0, 1.0, 1.0], [1, 2, 3]) == (1.0, 1.0)
    assert cluster_bootstrap([1.0, 0.0] * 20, range(40), seed=3) == cluster_bootstrap(
        [1.0, 0.0] * 20, range(40), seed=3
    )
    with pytest.raises(ValueError, match="clusters"):
        cluster_bootstrap([1.0], [1, 2])
