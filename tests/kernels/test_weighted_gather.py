"""weighted_gather: the reference and the CPU path against brute force; Triton in a process of its own."""

import pytest
import torch

from memlayers.kernels.weighted_gather import cpu, reference, weighted_gather
from tests.kernels.interpreted import needs_gpu, run_triton
from tests.kernels.poisoned import poisoned  # noqa: F401
from tests.kernels.weighted_gather_cases import (
    CASES,
    ROUNDING,
    brute_force,
    check_equal,
    check_parity,
    check_rows,
    make,
    run,
)

PATHS = ["reference", "cpu"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype, index_dtype, sparse, path):
    check_parity(case, dtype, index_dtype, sparse, path)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path):
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[[0, 2, 2], [3, 0, 2]], [[4, 4, 4], [3, 2, 0]]])
    assert torch.autograd.gradcheck(
        lambda table, weights: weighted_gather(table, indices, weights, path=path), (table, weights)
    )


def large(dtype):
    """Half the rows unread, three of them read by all bags."""
    table = torch.randn(40_000, 64).to(dtype)
    indices = torch.randint(len(table), (300, 96))
    indices[:, :8] = torch.randint(3, (300, 8))
    weights, grad = torch.rand(300, 96).to(dtype), torch.randn(300, 64).to(dtype)
    return table, indices, weights, grad


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(dtype, sparse):
    inputs = large(dtype)
    out, grad_table, grad_weights = run(*inputs, "cpu", sparse)
    table, indices, weights, grad = inputs
    exact = run(table.double(), indices, weights.double(), grad.double(), "reference")
    if sparse:
        check_rows(grad_table, indices)
    names = "result", "gradient to the table", "gradient to the weights"
    for name, actual, expected in zip(names, (out, grad_table.to_dense(), grad_weights), exact):
        check_equal(actual, expected, ROUNDING[dtype], name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sparse", [False, True])
def test_backward_is_bit_equal(sparse, path):
    inputs = large(torch.float32)
    first = run(*inputs, path, sparse)
    threads = torch.get_num_threads()
    try:
        for repeat in range(19):
            torch.set_num_threads(1 + repeat % 2)
            for a, b in zip(first, run(*inputs, path, sparse)):
                assert torch.equal(a.to_dense(), b.to_dense())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_another_dtype(path):
    """Gradients come in the dtypes of what they belong to. The CPU path rounds the weights to the table's dtype
    first, and their gradient too: with the rounding of the result, two roundings of relative 2⁻⁸ a product."""
    table, indices, weights, grad = make("odd width, many reads", torch.float32)
    table, grad = table.bfloat16(), grad.bfloat16()
    results = run(table, indices, weights, grad, path)
    assert [result.dtype for result in results] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for actual, exact in zip(results, brute_force(table, indices, weights, grad)):
        check_equal(actual, exact, 2.0**-8, path, tolerance=2.0**-8)


@pytest.mark.parametrize("path", PATHS)
def test_strided_inputs(path):
    """A column shard of a table, a transposed table, expanded weights and an expanded gradient."""
    whole = torch.randn(9, 12)
    indices, weights = torch.randint(9, (3, 4)).T, torch.randn(4, 1).expand(4, 3)
    for table in (whole[:, 3:8], whole.T[:9]):
        grad = torch.randn(4, 1).expand(4, table.shape[1])
        for actual, exact in zip(
            run(table, indices, weights, grad, path), brute_force(table, indices, weights, grad)
        ):
            check_equal(actual, exact, 0.0, "strided")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_read_twice(sparse, path):
    """A pool shared by two layers: the gradients add up, in `.grad` too."""
    table, indices, weights, grad = make("heads and tokens", torch.float32)
    table.requires_grad_()
    other = (indices + 1) % len(table)
    for rows in (indices, other):
        weighted_gather(table, rows, weights, sparse, path).backward(grad)
    exact = sum(brute_force(table, rows, weights, grad)[1] for rows in (indices, other))
    assert table.grad.is_sparse == sparse
    check_equal(table.grad.to_dense(), exact, 0.0, "two reads")


@pytest.mark.parametrize("path", PATHS)
def test_sparse_grad_attribute_is_sorted_and_unique(path):
    """Autograd drops the flag `is_coalesced` on the way into `.grad`; what it stood for still holds there."""
    table, indices, weights, grad = make("odd width, many reads", torch.float32)
    weighted_gather(table.requires_grad_(), indices, weights, True, path).backward(grad)
    assert table.grad._indices()[0].tolist() == indices.unique().tolist()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [-1, 11, 2**40])
def test_index_outside_the_table(index, path):
    table, indices, weights, _ = make("heads and tokens")
    indices[1, 2, 3] = index
    with pytest.raises(IndexError, match=rf"indices: {index} is not a row of the table, which has 11 rows"):
        weighted_gather(table, indices, weights, path=path)


def test_only_the_gradients_asked_for(monkeypatch):
    def refuse(*_):
        raise AssertionError("this gradient was not asked for")

    table, indices, weights, grad = make("heads and tokens")
    assert not weighted_gather(table, indices, weights, path="cpu").requires_grad
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "table_gradient", refuse)
        weighted_gather(table, indices, weights.requires_grad_(), path="cpu").backward(grad)
        assert weights.grad is not None
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "read_dots", refuse)
        weighted_gather(table.requires_grad_(), indices, weights.detach(), path="cpu").backward(grad)
        assert table.grad is not None


def test_path(monkeypatch):
    """By argument, then by environment variable, then by device."""
    taken = []
    for module in (reference, cpu):
        monkeypatch.setattr(module, "weighted_gather", lambda *_, name=module.__name__: taken.append(name))
    inputs = make("heads and tokens")[:3]
    monkeypatch.delenv("MEMLAYERS_KERNELS", raising=False)
    weighted_gather(*inputs)
    monkeypatch.setenv("MEMLAYERS_KERNELS", "reference")
    weighted_gather(*inputs)
    weighted_gather(*inputs, path="cpu")
    assert [name.rsplit(".")[-1] for name in taken] == ["cpu", "reference", "cpu"]
    with pytest.raises(ValueError, match="weighted_gather: path is 'gpu'"):
        weighted_gather(*inputs, path="gpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, i, w: (t[0], i, w), ValueError, r"table: must be \(n_rows, value_dim\)"),
        (lambda t, i, w: (t.long(), i, w), ValueError, "table: .* of torch.int64"),
        (lambda t, i, w: (t, i.to(torch.int16), w), TypeError, "indices: must be int32 or int64"),
        (lambda t, i, w: (t, i, w.long()), TypeError, "weights: must be floats"),
        (lambda t, i, w: (t, i[:1], w), ValueError, r"indices \(1, 3, 6\) and weights \(2, 3, 6\)"),
        (lambda t, i, w: (t, i[0, 0, 0], w[0, 0, 0]), ValueError, r"must have one shape \(\.\.\., n\)"),
        (lambda t, i, w: (t.to("meta"), i, w), ValueError, "must be on one device, not on cpu, meta"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        weighted_gather(*change(*make("heads and tokens")[:3]))


@pytest.mark.full
def test_triton_interpreted():
    run_triton("triton_weighted_gather.py", interpret=True)


@needs_gpu
@pytest.mark.gpu
def test_triton_gpu():
    run_triton("triton_weighted_gather.py", interpret=False)
