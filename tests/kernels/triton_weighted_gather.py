"""The Triton path of weighted_gather; run by test_weighted_gather.py in the interpreter, and on a GPU."""

import pytest
import torch

from memlayers.kernels.paths import interpreted
from memlayers.kernels.weighted_gather import triton as module
from memlayers.kernels.weighted_gather import weighted_gather
from tests.kernels.interpreted import DEVICE
from tests.kernels.poisoned import poisoned  # noqa: F401
from tests.kernels.weighted_gather_cases import (
    CASES,
    ROUNDING,
    brute_force,
    check_equal,
    check_parity,
    make,
    run,
)

# Triton's interpreter cuts bfloat16 off instead of rounding to nearest: twice the error of a rounding.
ROUNDINGS = ROUNDING | ({torch.bfloat16: 2.0**-7} if interpreted() else {})


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype, sparse):
    index_dtype = torch.int32 if sparse else torch.int64
    check_parity(case, dtype, index_dtype, sparse, "triton", DEVICE, ROUNDINGS)


def test_other_index_dtypes():
    check_parity("heads and tokens", torch.float32, torch.int64, True, "triton", DEVICE)
    check_parity("heads and tokens", torch.float32, torch.int32, False, "triton", DEVICE)


def test_weights_of_another_dtype():
    """float32 weights of a bfloat16 table are not rounded: only the results are, each to its dtype."""
    table, indices, weights, grad = make("odd width, many reads", torch.float32, device=DEVICE)
    table, grad = table.bfloat16(), grad.bfloat16()
    out, grad_table, grad_weights = run(table, indices, weights, grad, "triton")
    exact_out, exact_table, exact_weights = brute_force(table, indices, weights, grad)
    assert (out.dtype, grad_table.dtype, grad_weights.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    check_equal(out, exact_out, ROUNDINGS[torch.bfloat16], "result")
    check_equal(grad_table, exact_table, ROUNDINGS[torch.bfloat16], "gradient to the table")
    check_equal(grad_weights, exact_weights, 0.0, "gradient to the weights")


def test_gradcheck():
    table = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weights = torch.randn(2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    indices = torch.tensor([[0, 2, 2], [3, 0, 2]], device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda table, weights: weighted_gather(table, indices, weights, path="triton"), (table, weights)
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_backward_is_bit_equal(sparse):
    inputs = make("wide", torch.float32, device=DEVICE)
    if (
        not interpreted()
    ):  # programs run at the same time only on a GPU: many of them, some rows read by all bags
        indices = torch.randint(50_000, (2000, 64), device=DEVICE)
        indices[:, :4] = torch.randint(3, (2000, 4), device=DEVICE)
        shapes = (50_000, 256), (2000, 64), (2000, 256)
        table, weights, grad = (torch.randn(shape, device=DEVICE) for shape in shapes)
        inputs = table, indices, weights, grad
    first = run(*inputs, "triton", sparse)
    for _ in range(19):
        for a, b in zip(first, run(*inputs, "triton", sparse)):
            assert torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_are_read_often(sparse):
    """Runs longer than what one step of the table's gradient takes, beside runs of one."""
    indices = torch.tensor([[3, 3, 3, 3, 3], [3, 3, 0, 3, 3], [3, 3, 3, 3, 5]], device=DEVICE)
    table = torch.randn(6, 10, device=DEVICE)
    weights, grad = torch.randn(3, 5, device=DEVICE), torch.randn(3, 10, device=DEVICE)
    results = run(table, indices, weights, grad, "triton", sparse)
    for actual, exact in zip(results, brute_force(table, indices, weights, grad)):
        check_equal(actual.to_dense(), exact, 0.0, "often")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("index", [-1, -(2**33), 7, 2**31 + 2, 2**32 + 3])
def test_outside_the_table(index, sparse):
    """Reads as zeros, gets no gradient, and does not appear in a sparse gradient, cut to 32 bits or not."""
    table = torch.randn(7, 3, device=DEVICE)
    indices = torch.tensor([[0, index, 6], [index, index, index]], device=DEVICE)
    weights, grad = torch.randn(2, 3, device=DEVICE), torch.randn(2, 3, device=DEVICE)
    out, grad_table, grad_weights = run(table, indices, weights, grad, "triton", sparse)
    exact = brute_force(table, indices, weights, grad)
    for actual, expected in zip((out, grad_table.to_dense(), grad_weights), exact):
        check_equal(actual, expected, 0.0, "outside")
    if sparse:
        assert grad_table.indices().tolist() == [[0, 6]]


def test_offsets_beyond_32_bits():
    """Rows behind element 2³¹ of the table. On the CPU only the pages touched take memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GB with NaN would touch them all
    n_rows = 2**21 + 3
    table = torch.empty(n_rows, 1024, dtype=torch.bfloat16, device=DEVICE)
    indices = torch.tensor([[n_rows - 1, 1, n_rows - 3]], device=DEVICE, dtype=torch.int32)
    table[indices.flatten().long()] = torch.randn(3, 1024, device=DEVICE).bfloat16()
    weights, grad = (torch.randn(1, n, device=DEVICE).bfloat16() for n in (3, 1024))
    out, grad_table, grad_weights = run(table, indices, weights, grad, "triton", sparse=True)
    assert grad_table.indices().tolist() == [[1, n_rows - 3, n_rows - 1]]

    small, renumbered = table[[1, n_rows - 3, n_rows - 1]], torch.tensor([[2, 0, 1]])
    exact = brute_force(small, renumbered, weights, grad)
    for actual, expected in zip((out, grad_table.values(), grad_weights), exact):
        check_equal(actual, expected, ROUNDINGS[torch.bfloat16], "far")


def test_strided_inputs():
    """A column shard of a table, a transposed table, expanded weights and an expanded gradient."""
    whole = torch.randn(9, 12, device=DEVICE)
    indices = torch.randint(9, (3, 4), device=DEVICE).T
    weights = torch.randn(4, 1, device=DEVICE).expand(4, 3)
    grad = torch.randn(4, 1, device=DEVICE)
    for table in (whole[:, 3:8], whole.T[:9]):
        expanded = grad.expand(4, table.shape[1])
        for actual, exact in zip(
            run(table, indices, weights, expanded, "triton"), brute_force(table, indices, weights, expanded)
        ):
            check_equal(actual, exact, 0.0, "strided")


def test_only_the_gradients_asked_for(monkeypatch):
    def refuse(*_):
        raise AssertionError("this gradient was not asked for")

    table, indices, weights, grad = make("heads and tokens", torch.float32, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "table_gradient", refuse)
        weighted_gather(table, indices, weights.requires_grad_(), path="triton").backward(grad)
        assert weights.grad is not None
    with monkeypatch.context() as patch:
        patch.setattr(module, "weight_gradient", refuse)
        weighted_gather(table.requires_grad_(), indices, weights.detach(), path="triton").backward(grad)
        assert table.grad is not None
