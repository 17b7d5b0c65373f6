"""The benchmark of RowSparseAdamW measures what it says."""

import numpy as np
import pytest

from memlayers.eval.speed.row_sparse_adamw import (
    DENSE,
    SPARSE,
    summarize,
    time_steps,
    train_a_table,
    train_in_own_process,
)


def test_every_optimizer_is_timed_in_every_round():
    times = time_steps(n_rows=64, dim=4, n_reads=16, rounds=3, warm_up=1)
    assert times.keys() == DENSE.keys() | SPARSE.keys()
    assert all(found.shape == (3,) and (found > 0).all() for found in times.values())


def test_the_faster_dense_optimizer_is_the_yardstick():
    rng = np.random.default_rng(0)
    machine = rng.uniform(
        1, 3, size=50
    )  # a busy machine slows all down in a round and drops out of the ratio
    seconds = {name: 0.01 * (i + 1) for i, name in enumerate(SPARSE)}
    times = {name: machine * s for name, s in {**seconds, "AdamW": 1.0, "AdamW fused": 0.2}.items()}
    report = summarize(times)
    assert report["yardstick"] == "AdamW fused"
    for name, s in seconds.items():
        assert report["ratio"][name] == pytest.approx(dict.fromkeys(("p20", "p50", "p80"), s / 0.2))
        assert report["step_ms"][name]["p50"] == pytest.approx(1e3 * s * np.median(machine))


@pytest.mark.parametrize("state", ["float32", "dense"])
def test_a_table_is_trained(state):
    found = train_a_table(state, n_rows=50, dim=4, steps=3, n_tokens=5, reads=4)
    assert 0 < found["rows_read"] < 1
    assert found["seconds_per_step"] > 0
    assert found["peak_resident_mb"] > 50


@pytest.mark.slow
def test_the_peak_is_that_of_a_process_of_its_own():
    """Whatever this process has held: 2^16 × 256 weights and two moments take 201 MB, python and torch 200 to 500."""
    held = np.ones(2**27)
    found = train_in_own_process("float32", 2**16, 256, steps=3)
    assert held.nbytes > 1e9
    assert 350 < found["peak_resident_mb"] < 1000
    assert found["rows_read"] > 0.99
