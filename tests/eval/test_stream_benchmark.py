"""The stream benchmark measures what it says."""

import pytest
from matrix import llama

from memlayers.eval.speed.stream import Mark, load_base, measure, summarize


def test_marks_cover_the_text():
    marks, state = measure(llama().model(), 1000, progress=False)
    assert marks[-1].tokens == 1000 and [m.tokens for m in marks] == sorted(m.tokens for m in marks)
    assert all(m.wall_s > 0 and m.resident > 0 for m in marks)
    assert state.batch_size == 1


@pytest.mark.parametrize("slow_down", [1.0, 2.0])
def test_growth_and_slow_down_show(slow_down):
    """A stream that leaks 1 kB a token and gets slower is reported as such."""
    n = 400
    marks = [
        Mark(500 * (i + 1), 0.1 * (slow_down if i > n // 2 else 1), 0.1, 100_000_000 + 500_000 * i)
        for i in range(n)
    ]
    report = summarize(marks)
    assert report["resident_growth_mb"] == pytest.approx((n - 20) * 0.5)
    assert report["us_per_token_wall"]["end_over_start"] == pytest.approx(
        dict.fromkeys(["p20", "p50", "p80"], slow_down)
    )
    assert report["us_per_token_cpu"]["start"]["p50"] == pytest.approx(200.0)


def test_a_base_is_always_there():
    model, name = load_base(None)
    assert model.config.hidden_size == 64 and name
