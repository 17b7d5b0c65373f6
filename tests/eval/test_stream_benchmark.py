"""The stream benchmark measures what it says."""

import pytest
from matrix import llama

from memlayers.eval.speed.stream import Mark, load_base, measure, summarize


def test_marks_cover_the_text():
    marks, state = measure(llama().model(), 1000, progress=False)
    assert marks[-1].tokens == 1000 and [m.tokens for m in marks] == sorted(m.tokens for m in marks)
    assert all(m.wall_s > 0 and m.resident > 0 for m in marks)
    assert state.batch_size == 1


@pytest.mark.parametrize("machine", [1.0, 3.0], ids=["steady_machine", "busy_at_the_end"])
@pytest.mark.parametrize("slow_down", [1.0, 2.0])
def test_growth_and_slow_down_show(slow_down, machine):
    """A stream that leaks 1 kB a token and gets slower is reported as such, a busy machine is not."""
    n, marks = 400, []
    for i in range(n):
        busy, slower = (machine, slow_down) if i > n // 2 else (1.0, 1.0)
        control = 0.1 * busy if i % 5 == 0 else None
        marks.append(Mark(500 * (i + 1), 0.1 * busy * slower, 0.1, 10**8 + 500_000 * i, control, 0.1))
    report = summarize(marks)
    assert report["resident_growth_mb"] == pytest.approx((n - 20) * 0.5)
    wall = report["us_per_token_wall"]
    assert wall["end_over_start"] == pytest.approx(slow_down * machine)
    assert wall["over_control_end_over_start"] == pytest.approx(slow_down)
    assert report["us_per_token_cpu"]["start"] == pytest.approx(200.0)


def test_a_base_is_always_there():
    model, name = load_base(None)
    assert model.config.hidden_size == 64 and name
