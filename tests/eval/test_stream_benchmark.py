"""The stream benchmark measures what it says."""

import pytest
from matrix import llama

import memlayers as ml
from memlayers.eval.speed.stream import Mark, by_length, load_base, measure, memory_config, summarize


def test_marks_cover_the_text():
    marks, state = measure(llama().model(), 1000, progress=False)
    assert marks[-1].tokens == 1000 and [m.tokens for m in marks] == sorted(m.tokens for m in marks)
    assert all(m.wall_s > 0 and m.resident > 0 for m in marks)
    assert state.batch_size == 1
    assert marks[-1].state_bytes == state.nbytes


def test_a_neural_memory_is_watched_too():
    model, _ = load_base(None)
    ml.attach(model.eval(), memory_config("neural", 8, 32, sliding_window=16))
    marks, state = measure(model, 2500, progress=False)
    assert [mark.tokens for mark in marks] == [1024, 2048, 2500] and "layers.0.weights.0" in state["neural"]
    assert {mark.state_bytes for mark in marks} == {state.nbytes}
    assert all(tensor.isfinite().all() for tensor in state["neural"].values())


@pytest.mark.parametrize("machine", [1.0, 3.0], ids=["steady_machine", "busy_at_the_end"])
@pytest.mark.parametrize("slow_down", [1.0, 2.0])
def test_growth_and_slow_down_show(slow_down, machine):
    """A stream that leaks 1 kB a token and gets slower is reported as such, a busy machine is not."""
    n, marks = 400, []
    for i in range(n):
        busy, slower = (machine, slow_down) if i > n // 2 else (1.0, 1.0)
        control = 0.1 * busy if i % 5 == 0 else None
        resident = 10**8 + 500_000 * i
        marks.append(Mark(500 * (i + 1), 0.1 * busy * slower, 0.1, resident, control, 0.1, 1000 + i))
    report = summarize(marks)
    assert report["resident_growth_mb"] == pytest.approx((n - 20) * 0.5)
    assert report["state_growth_bytes"] == n - 20 and report["state_bytes"] == 1000 + n - 1
    wall = report["us_per_token_wall"]
    assert wall["end_over_start"] == pytest.approx(slow_down * machine)
    assert wall["over_control_end_over_start"] == pytest.approx(slow_down)
    assert report["us_per_token_cpu"]["start"] == pytest.approx(200.0)


def test_medians_by_length():
    """Calls of 512 tokens, 51.2 ms each, twice that from 16,384 on; the control always 51.2."""
    marks = [
        Mark(512 * (i + 1), 0.0512 * (2 if i >= 32 else 1), 0.0256, 1, 0.0512, 0.0512) for i in range(100)
    ]
    found = by_length(marks)
    assert list(found) == [4096, 8192, 16384, 32768]
    assert [cell["wall"] for cell in found.values()] == pytest.approx([100, 100, 200, 200])
    assert [cell["cpu"] for cell in found.values()] == pytest.approx([50] * 4)
    assert [cell["control_wall"] for cell in found.values()] == pytest.approx([100] * 4)


def test_a_base_is_always_there():
    model, name = load_base(None)
    assert model.config.hidden_size == 64 and name
