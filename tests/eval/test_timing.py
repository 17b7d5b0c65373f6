"""What the benchmarks share."""

import pytest
import torch

from memlayers.eval.speed.timing import installed, peak_memories, peak_memory


def test_peak_memory_is_what_is_held_at_once():
    """A megabyte at a time is one; two held together are two; what was there before does not count."""
    held = torch.ones(2**18)

    def one_after_the_other():
        for _ in range(5):
            (held + 1).sum()

    def together():
        a = held + 1
        b = a + 1
        (a.sum() + b.sum()).item()

    peaks = peak_memories({"one": one_after_the_other, "two": together}, "cpu")
    assert peaks["one"] == pytest.approx(2**20, rel=0.01) and peaks["two"] == pytest.approx(2**21, rel=0.01)
    assert peak_memory(together, "cpu") == peaks["two"]


def test_peak_memory_of_a_backward_pass_counts_what_it_saves():
    x = torch.ones(2**18, requires_grad=True)
    peak = peak_memory(lambda: torch.autograd.grad(x.exp().sin().sum(), x), "cpu")
    assert 3 * 2**20 <= peak <= 5 * 2**20


def test_installed():
    assert installed("torch") and not installed("no-such-package-memlayers")
