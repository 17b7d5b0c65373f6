"""Every row as AdamW would train it alone; and nothing else moves."""

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from memlayers.optim import clip_gradients, row_sparse_adamw
from memlayers.optim.row_sparse_adamw import STATES, RowSparseAdamW, coalesce_rows
from tests.optim.row_sparse_cases import OPTIONS, D, N, draw_gradients, new_table, run, sparse


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
