"""The Triton path of product_key_topk; run by test_product_key_topk.py in the interpreter, and on a GPU."""

import pytest
import torch

from memlayers.kernels.paths import interpreted
from memlayers.kernels.product_key_topk import product_key_topk, triton
from tests.kernels.interpreted import DEVICE
from tests.kernels.product_key_topk_cases import (
    CASES,
    check,
    check_deterministic,
    check_parity,
    distinct,
    tied,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: twice the error, and not the same bits.
ROUNDING = {torch.bfloat16: 2.0**-7} if interpreted() else {}
SMALL = [case for case in CASES if case != "more keys than a block"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_parity(case, dtype):
    check_parity(case, dtype, "triton", DEVICE, ROUNDING.get(dtype))


@pytest.mark.parametrize("case", ["heads and tokens", "k is n_keys"])
def test_ties(case):
    check(*tied(case, device=DEVICE), CASES[case][2], "triton")


def test_more_keys_than_a_block():
    check(*torch.randn(2, 2, 150).to(DEVICE), 3, "triton")


def test_more_pairs_than_a_block():
    """At k = 20 there are 66 candidates, two blocks of them; the last one wins where one key outdoes the others."""
    one, two = torch.randn(2, 2, 24).to(DEVICE)
    two[0, 5] += 20
    check(one, two, 20, "triton")


def test_backward_is_deterministic():
    rows = 2 if interpreted() else 4096
    check_deterministic(
        "triton", rows, 10 if interpreted() else 256, 8 if interpreted() else 32, device=DEVICE
    )


def test_nan_stays_in_range():
    """On a GPU the assertion comes late: until then every index is one that a table has."""
    one, two = torch.randn(2, 3, 10, device=DEVICE)
    one[0, 3], two[1, 4], two[2] = torch.nan, -torch.tensor(torch.nan), torch.nan
    scores, indices = triton.product_key_topk(one, two, 4)
    assert scores[:, 0].isnan().all()
    assert ((indices >= 0) & (indices < 100)).all()
    assert all(len(row.unique()) == 4 for row in indices)


def test_what_it_does_not_take():
    one, two = torch.randn(2, 3, 10, device=DEVICE)
    with pytest.raises(ValueError, match=r"no float64.*path='reference'"):
        product_key_topk(one.double(), two.double(), 4, path="triton")
    with pytest.raises(ValueError, match="n_keys 40000"):
        product_key_topk(*torch.randn(2, 1, 40000, device=DEVICE), 4, path="triton")


def test_differentiable_once():
    one, two = (scores.requires_grad_() for scores in distinct("k is 1", device=DEVICE))
    scores, _ = product_key_topk(one, two, 2, path="triton")
    (grad,) = torch.autograd.grad(scores.square().sum(), one, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


if not interpreted():

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n_keys, k", [(256, 32), (1000, 32), (4096, 32), (512, 300)])
    def test_sizes_in_use(n_keys, k, dtype):
        check(*torch.randn(2, 16, n_keys).to(DEVICE, dtype), k, "triton")
