"""Every row as AdamW would train it alone; and nothing else moves."""

import copy

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from memlayers.optim import clip_gradients, row_sparse_adamw
from memlayers.optim.row_sparse_adamw import STATES, RowSparseAdamW, coalesce_rows, round_stochastically

N, D = 12, 5
OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}


def sparse(rows: list[int], values: torch.Tensor, n: int = N) -> torch.Tensor:
    """An uncoalesced gradient, as the backward pass of an embedding makes it."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64), values, (n, values.shape[1]), check_invariants=True
    )


def draw_gradients(steps: int, seed: int = 0) -> list[tuple[list[int], torch.Tensor]]:
    """Rows and values for every step: 7 reads of 9 rows, so some twice and some never."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, 9, (7,), generator=generator).tolist(), torch.randn(7, D, generator=generator))
        for _ in range(steps)
    ]


def new_table(dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).to(dtype))


def run(table: nn.Parameter, optimizer: torch.optim.Optimizer, gradients) -> None:
    for rows, values in gradients:
        table.grad = sparse(rows, values.to(table.dtype))
        optimizer.step()


def oracle(table: torch.Tensor, gradients, dtype: torch.dtype, **options) -> torch.Tensor:
    """Each row with a torch.optim.AdamW of its own, stepped only where the row is read."""
    rows = [nn.Parameter(row.detach().clone().to(dtype)) for row in table]
    optimizers = [torch.optim.AdamW([row], **options) for row in rows]
    for read, values in gradients:
        summed = torch.zeros(N, D, dtype=dtype).index_add_(0, torch.tensor(read), values.to(dtype))
        for i in set(read):
            rows[i].grad = summed[i]
            optimizers[i].step()
    return torch.stack([row.detach() for row in rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.9, 0.999), (0.0, 0.0)])
def test_every_row_equals_adamw_on_that_row_alone(dtype, weight_decay, betas):
    options = {**OPTIONS, "weight_decay": weight_decay, "betas": betas}
    table, gradients = new_table(), draw_gradients(30)
    expected = oracle(table, gradients, dtype, **options)
    run(table, RowSparseAdamW([table], **options), gradients)
    # 30 steps of float32 rounding (6e-8 each) on weights of about 1
    torch.testing.assert_close(table.detach().to(dtype), expected, rtol=2e-6, atol=2e-6)


def test_a_row_read_for_the_first_time_late_is_corrected_for_its_own_steps():
    """After 500 steps of another row, the first step of a row is lr · sign(g), as a first step of Adam is."""
    table = nn.Parameter(torch.zeros(2, 3))
    optimizer = RowSparseAdamW([table], lr=0.1)
    for _ in range(500):
        table.grad = sparse([0], torch.ones(1, 3), n=2)
        optimizer.step()
    table.grad = sparse([1], torch.tensor([[2.0, -3.0, 1e-3]]), n=2)
    optimizer.step()
    torch.testing.assert_close(table.detach()[1], torch.tensor([-0.1, 0.1, -0.1]), rtol=2e-5, atol=0)
    assert optimizer.state[table]["row_steps"].tolist() == [500, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", STATES)
def test_rows_that_are_not_read_keep_their_bits(dtype, state):
    table = new_table(dtype)
    optimizer = RowSparseAdamW([table], **OPTIONS, weight_decay=0.5, state=state)
    run(table, optimizer, draw_gradients(3))
    entries = optimizer.state[table]
    watched = {"table": table.data, **{k: v for k, v in entries.items() if isinstance(v, torch.Tensor)}}
    before = {name: tensor.clone() for name, tensor in watched.items()}
    table.grad = sparse([3, 10, 3], torch.ones(3, D, dtype=dtype))
    optimizer.step()
    others = [i for i in range(N) if i not in (3, 10)]
    for name, tensor in watched.items():
        assert torch.equal(tensor[others], before[name][others]), name
        for row in (3, 10):
            assert not torch.equal(tensor[row], before[name][row]), name


def test_reads_of_one_row_add_up():
    values = torch.randn(3, D)
    tables = [new_table(), new_table()]
    for table, gradient in zip(
        tables, (sparse([4, 2, 4], values), sparse([2, 4], torch.stack([values[1], values[0] + values[2]])))
    ):
        table.grad = gradient
        RowSparseAdamW([table], **OPTIONS).step()
    assert torch.equal(*tables)


def test_coalescing():
    values = torch.randn(3, D)
    for rows in ([1, 4, 5], [1, 1, 5], [5, 4, 1]):
        gradient = sparse(rows, values)
        found = coalesce_rows(gradient)
        assert found.is_coalesced()
        assert torch.equal(found.indices(), gradient.coalesce().indices())
        assert torch.equal(found.values(), gradient.coalesce().values())
    empty = coalesce_rows(sparse([], torch.empty(0, D)))
    assert empty.is_coalesced()
    assert empty._nnz() == 0


def test_no_reads_change_nothing():
    table, unused = new_table(), new_table(seed=2)
    optimizer = RowSparseAdamW([table, unused], **OPTIONS, weight_decay=0.5)
    before = table.detach().clone()
    table.grad = sparse([], torch.empty(0, D))
    optimizer.step()
    assert torch.equal(table, before)
    assert not optimizer.state
    run(table, optimizer, draw_gradients(2))
    after = table.detach().clone()
    table.grad = sparse([], torch.empty(0, D))
    optimizer.step()
    assert torch.equal(table, after)


@pytest.mark.parametrize("state", ["float32", "row"])
def test_working_in_pieces_changes_nothing(monkeypatch, state):
    tables = [new_table(), new_table()]
    for table, chunk in zip(tables, (2**16, 2 * D)):
        monkeypatch.setattr(row_sparse_adamw, "CHUNK_CPU", chunk)
        run(table, RowSparseAdamW([table], **OPTIONS, state=state), draw_gradients(4))
    # vector instructions and the loop for the rest of a piece round a last bit differently
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-6)


def test_row_state_against_its_formula():
    table, gradients = new_table(), draw_gradients(30)
    theta, m = table.detach().double().clone(), torch.zeros(N, D, dtype=torch.float64)
    v, t = torch.zeros(N, dtype=torch.float64), torch.zeros(N)
    lr, (beta_1, beta_2), eps = OPTIONS["lr"], OPTIONS["betas"], OPTIONS["eps"]
    for read, values in gradients:
        summed = torch.zeros(N, D, dtype=torch.float64).index_add_(0, torch.tensor(read), values.double())
        for i in set(read):
            t[i] += 1
            m[i] = beta_1 * m[i] + (1 - beta_1) * summed[i]
            v[i] = beta_2 * v[i] + (1 - beta_2) * summed[i].square().mean()
            scale = (v[i] / (1 - beta_2 ** t[i].item())).sqrt() + eps
            theta[i] -= lr * m[i] / (1 - beta_1 ** t[i].item()) / scale
    optimizer = RowSparseAdamW([table], **OPTIONS, state="row")
    run(table, optimizer, gradients)
    torch.testing.assert_close(table.detach().double(), theta, rtol=2e-6, atol=2e-6)  # float32 rounding
    assert optimizer.state[table]["exp_avg_sq"].shape == (N, 1)


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


@pytest.mark.parametrize("largest", [0.5, 1e3])
def test_with_clipping_in_accelerate_equals_dense_training(largest):
    """A table of which every row is read in every step: dense AdamW and torch's clipping say the same."""
    rows = torch.cat(
        [torch.arange(N), torch.randint(0, N, (20,), generator=torch.Generator().manual_seed(0))]
    )
    results = []
    for is_sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(N, D, sparse=is_sparse), nn.Linear(D, 3), nn.Tanh())
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(model)
        table, *rest = model.parameters()
        others = torch.optim.AdamW(rest, **OPTIONS)
        own = (RowSparseAdamW if is_sparse else torch.optim.AdamW)([table], **OPTIONS, weight_decay=0.1)
        optimizers = accelerator.prepare(others, own)
        norms = []
        for _ in range(10):
            accelerator.backward((model(rows) - 1).square().sum())
            if is_sparse:
                norms.append(clip_gradients(model.parameters(), largest))
            else:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), largest))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append([*(p.detach() for p in model.parameters()), torch.stack(norms)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=1e-5
        )  # ten steps of float32 in another order


def test_dense_gradients_are_an_error_before_anything_changes():
    good, bad = new_table(), new_table(seed=2)
    optimizer = RowSparseAdamW([{"params": [good, bad], "name": "values"}], **OPTIONS)
    before = good.detach().clone()
    good.grad = sparse([1], torch.ones(1, D))
    for gradient in (torch.ones(N, D), torch.ones(N, D).to_sparse()):  # the latter: both dimensions sparse
        bad.grad = gradient
        with pytest.raises(TypeError, match=r"needs row-sparse gradients.*\(12, 5\) in group 'values'"):
            optimizer.step()
    assert torch.equal(good, before)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": -1.0}, "lr: must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas: must be two of"),
        ({"betas": (0.9,)}, "betas: must be two of"),
        ({"eps": 0.0}, "eps: must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay: must be at least 0"),
        ({"state": "float16"}, "state: must be one of float32, bfloat16, row"),
    ],
)
def test_wrong_options(options, told):
    with pytest.raises(ValueError, match=told):
        RowSparseAdamW([new_table()], **options)


def test_wrong_parameters():
    with pytest.raises(ValueError, match=r"tables of rows and columns, not shape \(3,\)"):
        RowSparseAdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match=r"float32 or bfloat16, not torch\.float64"):
        RowSparseAdamW([nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))])
    optimizer = RowSparseAdamW([new_table()])
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 2, dtype=torch.float16))]})
    assert len(optimizer.param_groups) == 1


def test_state_takes_memory_only_where_rows_were_read():
    """A gigabyte of zeros of which a thousand rows are written takes a few pages each."""
    before = psutil.Process().memory_info().rss
    zeros = row_sparse_adamw._zeros((2**20, 256), torch.float32, torch.device("cpu"))
    rows = torch.arange(0, 2**20, 2**10)
    zeros.index_copy_(0, rows, torch.ones(len(rows), 256))
    assert psutil.Process().memory_info().rss - before < 50e6
    assert zeros[rows].eq(1).all()
    assert not zeros[rows + 1].any()
