"""`RowSparseAdamW` in bfloat16: moments and tables that are rounded at random neither stall nor drift, and go on."""

import copy

import pytest
import torch
from torch import nn

from memlayers.optim import row_sparse_adamw
from memlayers.optim.row_sparse_adamw import STATES, RowSparseAdamW, round_stochastically
from tests.optim.row_sparse_cases import OPTIONS, D, N, draw_gradients, new_table, run, sparse


def test_bfloat16_state_stays_near_float32():
    gradients = draw_gradients(30)
    tables = {state: new_table() for state in ("float32", "bfloat16")}
    for state, table in tables.items():
        run(table, RowSparseAdamW([table], **OPTIONS, state=state), gradients[:1])
    assert torch.equal(*tables.values())  # rounding comes after the update, so the first one is exact
    tables = {state: new_table() for state in ("float32", "bfloat16")}
    for state, table in tables.items():
        run(table, RowSparseAdamW([table], **OPTIONS, state=state), gradients)
    # A stored moment is off by at most 2^-7 of itself, m by a few of those over its memory of 5 steps. A step
    # is about lr, so 20 of them that are off by 2% at random differ by 0.02 · √20 · lr, and never by 5 times that.
    error = (tables["float32"] - tables["bfloat16"]).abs().max().item()
    assert 0 < error < 5 * 0.02 * 20**0.5 * OPTIONS["lr"]


def test_bfloat16_state_does_not_stall():
    """Gradients shrink from 1 to 0.1. The second moment must follow; rounded to nearest it would stay."""
    n, steps, beta_2 = 256, 2000, 0.999
    table = nn.Parameter(torch.zeros(n, 1))
    optimizer = RowSparseAdamW([table], lr=0.0, state="bfloat16")
    exact, nearest = 0.0, torch.zeros((), dtype=torch.bfloat16)
    for step in range(steps):
        g = 1.0 if step < 500 else 0.1
        exact = beta_2 * exact + (1 - beta_2) * g * g
        nearest = (nearest.float() * beta_2 + (1 - beta_2) * g * g).bfloat16()
        table.grad = sparse(list(range(n)), torch.full((n, 1), g), n=n)
        optimizer.step()
    second = optimizer.state[table]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    assert abs(nearest.item() / exact - 1) > 0.2  # what rounding to nearest does
    # One rounding is off by 0.4 of the distance of two numbers (a step is a fifth of it), which is at most 2^-7 of
    # v: 0.3% a step. While v falls these add up, over 1500 steps to 12%. The mean of 256 rows has a sixteenth of it.
    assert second.float().mean().item() == pytest.approx(exact, rel=5 * 0.12 / 16)
    assert second.float().div(exact).sub(1).abs().max() < 5 * 0.12


def test_a_bfloat16_table_moves_at_small_learning_rates():
    """Steps of 1e-4 on weights of 1 are a fortieth of bfloat16's resolution there."""
    table = nn.Parameter(torch.ones(256, 4, dtype=torch.bfloat16))
    optimizer = RowSparseAdamW([table], lr=1e-4)
    for _ in range(100):
        table.grad = sparse(list(range(256)), torch.ones(256, 4, dtype=torch.bfloat16), n=256)
        optimizer.step()
    # 100 steps of 1e-4; rounding adds √(100 · 1e-4 · 2^-8) = 0.006 a weight at random, 0.0002 on the mean of 1024
    assert table.float().mean().item() == pytest.approx(1 - 0.01, abs=0.001)


def test_stochastic_rounding():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator)
    carries = row_sparse_adamw._carries(x.shape, generator)
    rounded = torch.stack([round_stochastically(x, next(carries)) for _ in range(400)]).float()
    towards_zero = x.view(torch.int32).bitwise_and(-(2**16))  # what remains is the upper half of the bits
    below, above = towards_zero.view(torch.float32), (towards_zero + 2**16).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    for part in (rounded, rounded[::2], rounded[1::2]):  # a draw gives two carries, which are both uniform
        # draws of one of two neighbours: their mean has a standard error of at most half the distance / √n
        error = (part.mean(0) - x) / (above - below)
        assert error.abs().max() < 5 * 0.5 / len(part) ** 0.5
    first, second = ((rounded[i::2] == above).float() for i in (0, 1))
    together = ((first - first.mean(0)) * (second - second.mean(0))).mean()
    assert together.abs() < 5 * 0.25 / 200_000**0.5  # and independent: the covariance of two coins is 0
    for kept in (
        torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf")]),
        torch.full((3,), torch.nan),
    ):
        carry = next(row_sparse_adamw._carries(kept.shape, generator))
        assert torch.equal(round_stochastically(kept, carry).float().nan_to_num(7), kept.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", STATES)
def test_state_dict_goes_on_bit_for_bit(dtype, state):
    """Into an optimizer of other options and seed: what was saved counts."""
    tables = [new_table(dtype), new_table(dtype, seed=2)]
    optimizer = RowSparseAdamW(tables, **OPTIONS, state=state, seed=3)

    def go_on(tables, optimizer, seed):
        for a, b in zip(draw_gradients(4, seed), draw_gradients(4, seed + 1)):
            for table, (rows, values) in zip(tables, (a, b)):
                table.grad = sparse(rows, values.to(dtype))
            optimizer.step()

    go_on(tables, optimizer, 0)
    saved, copies = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(tables)
    other = RowSparseAdamW(copies, lr=1.0)
    other.load_state_dict(saved)
    torch.rand(3)
    go_on(tables, optimizer, 10)
    go_on(copies, other, 10)
    assert all(torch.equal(*pair) for pair in zip(tables, copies))
    for table, twin in zip(tables, copies):
        assert optimizer.state[table].keys() == other.state[twin].keys()
        for key, value in optimizer.state[table].items():
            again = other.state[twin][key]
            assert (
                torch.equal(value, again) and value.dtype == again.dtype
                if key != "n_steps"
                else value == again
            )


def test_two_tables_and_two_steps_get_different_noise():
    values = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    tables = [nn.Parameter(torch.zeros(N, D)) for _ in range(2)]
    optimizer = RowSparseAdamW(tables, lr=0.0, state="bfloat16", betas=(0.0, 0.0))
    found = []
    for _ in range(2):
        for table in tables:
            table.grad = sparse(list(range(N)), values)
        optimizer.step()
        found += [optimizer.state[table]["exp_avg"].clone() for table in tables]
    assert not any(torch.equal(found[i], found[j]) for i in range(4) for j in range(i))
