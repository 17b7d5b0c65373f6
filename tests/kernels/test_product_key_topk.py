"""product_key_topk: the reference and the CPU path against brute force; Triton in a process of its own."""

import pytest
import torch

from memlayers.kernels.product_key_topk import cpu, product_key_topk
from tests.kernels.interpreted import needs_gpu, run_triton
from tests.kernels.product_key_topk_cases import (
    CASES,
    ROUNDING,
    brute_force,
    check,
    check_deterministic,
    check_parity,
    distinct,
    tied,
)

PATHS = ["reference", "cpu"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_brute_force(case, dtype, path):
    k = CASES[case][2]
    check(*distinct(case, dtype), k, path)
    check(*tied(case, dtype), k, path)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_cpu_equals_reference(case, dtype):
    check_parity(case, dtype, "cpu")


@pytest.mark.parametrize("n_keys, k", [(255, 40), (257, 128), (600, 32), (700, 300), (1500, 2)])
def test_many_keys(n_keys, k):
    """Through the tournament of blocks, with blocks that are not full, and past it."""
    check(*torch.randn(2, 3, n_keys), k, "cpu")
    check(*torch.randint(-3, 4, (2, 3, n_keys)).float(), k, "cpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows(threads, monkeypatch):
    """More rows than one chunk holds, in one thread and in two."""
    monkeypatch.setattr(cpu, "CHUNK", 640)
    one, two = torch.randn(2, 25, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(one, two, 4, "cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_candidates(k):
    """Exactly the pairs that fewer than k others beat; 119 at k = 32."""
    first, second = cpu.pairs(k)
    pairs = set(zip(first.tolist(), second.tolist()))
    assert len(pairs) == len(first)
    assert pairs == {(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k}
    assert k != 32 or len(pairs) == 119


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path):
    one, two = (scores.requires_grad_() for scores in distinct("n_keys is no power of two", torch.float64))

    def scores(one, two):
        return product_key_topk(one, two, 9, path=path)[0]

    assert torch.autograd.gradcheck(scores, (one, two))
    assert torch.autograd.gradgradcheck(scores, (one, two))


@pytest.mark.parametrize("path", PATHS)
def test_backward_is_deterministic(path):
    check_deterministic(path, 64, 40, 16)


@pytest.mark.parametrize("path", PATHS)
def test_strided_input(path):
    """Views that are not contiguous, as an einsum leaves them, and one input without a gradient."""
    one, two = torch.randn(2, 11, 3, 5).transpose(1, 3)
    assert not one.is_contiguous()
    check(one, two, 4, path)
    one = one.requires_grad_()
    product_key_topk(one, two, 4, path=path)[0].sum().backward()
    assert one.grad.sum() == 5 * 3 * 4


@pytest.mark.parametrize("path", PATHS)
def test_infinities(path):
    """A row of -inf alone, one with +inf and one that overflows; a choice is still made, of distinct places."""
    one, two = torch.randn(2, 3, 10)
    one[0] = -torch.inf
    two[1, 3] = torch.inf
    one[2, :4], two[2, :4] = 3e38, 3e38
    scores, indices = product_key_topk(one, two, 5, path=path)
    assert torch.equal(scores, brute_force(one, two, 5))
    assert all(len(row.unique()) == 5 for row in indices)


def test_default_path_and_environment(monkeypatch):
    one, two = torch.randn(2, 4, 10)
    calls, select = [], cpu.select
    monkeypatch.setattr(cpu, "select", lambda *args: calls.append(1) or select(*args))
    product_key_topk(one, two, 3)
    assert len(calls) == 1
    monkeypatch.setenv("MEMLAYERS_KERNELS", "reference")
    product_key_topk(one, two, 3)
    assert len(calls) == 1
    product_key_topk(one, two, 3, path="cpu")
    assert len(calls) == 2


def test_bad_input():
    one, two = torch.randn(2, 4, 10)
    for k in (0, 11, 2.0, True):
        with pytest.raises(ValueError, match=r"k is .*from 1 to n_keys, 10"):
            product_key_topk(one, two, k)
    with pytest.raises(ValueError, match=r"differ in shape: .*4, 10.*4, 9"):
        product_key_topk(one, two[:, :9], 3)
    with pytest.raises(ValueError, match="differ in dtype"):
        product_key_topk(one, two.double(), 3)
    with pytest.raises(ValueError, match="differ in device"):
        product_key_topk(one, two.to("meta"), 3)
    with pytest.raises(ValueError, match=r"scores_1 is a torch.int64 tensor"):
        product_key_topk(one.long(), two.long(), 3)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        product_key_topk(one[0, 0], two[0, 0], 1)
    with pytest.raises(ValueError, match=r"path is 'tritn'"):
        product_key_topk(one, two, 3, path="tritn")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("path", PATHS)
def test_nan_is_named(path, sign):
    """NaN of either sign bit, in either half, with the rows; an infinite sum is no NaN."""
    nan = torch.tensor(float("nan")).copysign(torch.tensor(float(sign)))
    one, two = torch.randn(2, 2, 6, 10)
    two[1, 4, 9] = nan
    with pytest.raises(ValueError, match=r"scores_2 holds NaN in 1 of 12 rows: \(1, 4\)$"):
        product_key_topk(one, two, 3, path=path)
    one[:, :4, 0] = nan
    with pytest.raises(ValueError, match=r"scores_1 holds NaN in 8 of 12 rows: \(0, 0\), .*\(1, 0\), \.\.\."):
        product_key_topk(one, two, 3, path=path)
    one, two = torch.randn(2, 2, 10)
    one[0, 1], one[1, 1] = torch.inf, -torch.inf
    product_key_topk(one, two, 3, path=path)


@pytest.mark.full
def test_triton_interpreted():
    run_triton("triton_product_key_topk.py", interpret=True)


@needs_gpu
@pytest.mark.gpu
def test_triton_gpu():
    run_triton("triton_product_key_topk.py", interpret=False)
