"""What the tests of product_key_topk share: scores with and without ties, brute force, and the checks."""

import torch

from memlayers.kernels.product_key_topk import product_key_topk

# leading shape, n_keys, k
CASES = {
    "heads and tokens": ((2, 3, 1), 16, 4),
    "n_keys is no power of two": ((3,), 37, 9),
    "k is 1": ((4,), 13, 1),
    "k is n_keys": ((3,), 12, 12),
    "one key": ((3,), 1, 1),
    "one row without a batch": ((), 21, 5),
    "more keys than a block": ((2,), 300, 3),
    "zero rows": ((0, 4), 8, 3),
}
# Unit of the last place, relative, when a result is rounded once to its dtype. float32: 1e-6 is the bar.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def brute_force(scores_1, scores_2, k):
    """The k greatest of all n_keys ** 2 sums, in float32 for narrower dtypes."""
    if scores_1.dtype.itemsize < 4:
        scores_1, scores_2 = scores_1.float(), scores_2.float()
    sums = (scores_1[..., :, None] + scores_2[..., None, :]).flatten(-2)
    return sums.topk(k).values


def tied(case, dtype=torch.float32, device="cpu"):
    """Scores of three values only, so that almost all sums are tied; with -inf and both zeros."""
    shape, n_keys, _ = CASES[case]
    generator = torch.Generator().manual_seed(3)
    values = torch.tensor([-float("inf"), -1.5, -0.0, 0.0, 0.25], dtype=dtype)
    picks = torch.randint(1, 5, (2, *shape, n_keys), generator=generator)
    picks[..., : n_keys // 3] = 0
    one, two = values[picks].to(device)
    return one, two


def distinct(case, dtype=torch.float32, device="cpu"):
    """Random scores whose k + 1 greatest sums differ in every row, so that the choice is the only one."""
    shape, n_keys, k = CASES[case]
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        one, two = torch.randn(2, *shape, n_keys, generator=generator).to(dtype)
        best = brute_force(one, two, min(k + 1, n_keys**2))
        if (best[..., 1:] < best[..., :-1]).all():
            return one.to(device), two.to(device)
    raise AssertionError(f"no seed gives distinct sums for {case}")


def run(scores_1, scores_2, k, path):
    """Scores, indices, and the gradients of both inputs for random gradients of the scores (returned last)."""
    one, two = (scores.detach().clone().requires_grad_() for scores in (scores_1, scores_2))
    scores, indices = product_key_topk(one, two, k, path=path)
    grads = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7)).to(scores)
    scores.backward(grads)
    return scores.detach(), indices, one.grad, two.grad, grads


def check(scores_1, scores_2, k, path, rounding=None):
    """Held against brute force: the scores, the sums at the indices, and the gradients at those indices."""
    dtype, n_keys = scores_1.dtype, scores_1.shape[-1]
    scores, indices, grad_1, grad_2, grads = run(scores_1, scores_2, k, path)
    assert scores.shape == indices.shape == (*scores_1.shape[:-1], k)
    assert (scores.dtype, indices.dtype, grad_1.dtype, grad_2.dtype) == (dtype, torch.int64, dtype, dtype)
    best = brute_force(scores_1, scores_2, k)
    if rounding is None:  # a sum is rounded once, the same way on both sides
        assert torch.equal(scores, best.to(dtype))
    else:
        torch.testing.assert_close(scores.to(best), best, rtol=rounding, atol=0)
    assert ((indices >= 0) & (indices < n_keys**2)).all()
    ordered = indices.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all(), "an index comes twice"
    i, j = indices // n_keys, indices % n_keys
    assert torch.equal(scores_1.to(best).gather(-1, i) + scores_2.to(best).gather(-1, j), best)
    for grad, place in ((grad_1, i), (grad_2, j)):
        exact = torch.zeros_like(grad, dtype=torch.float64).scatter_add(-1, place, grads.double())
        terms = torch.zeros_like(exact).scatter_add(-1, place, grads.double().abs())
        bound = (rounding or ROUNDING[dtype]) * exact.abs() + ROUNDING[torch.float32] * terms
        assert ((grad.double() - exact).abs() <= bound).all()


def check_parity(case, dtype, path, device="cpu", rounding=None):
    """Held against the reference on the CPU, with gradients, where the choice is the only one."""
    one, two = distinct(case, dtype)
    k = CASES[case][2]
    expected = run(one, two, k, "reference")
    actual = [tensor.cpu() for tensor in run(one.to(device), two.to(device), k, path)]
    assert torch.equal(actual[1], expected[1])
    rounding = rounding or ROUNDING[dtype]
    for mine, theirs in zip(actual, expected):  # gradients are about 1, and terms of both signs cancel
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding)


def check_deterministic(path, rows, n_keys, k, device="cpu"):
    """20 backward passes give the same bits, though the same few keys stand in most of the sums."""
    one, two = torch.randn(2, rows, n_keys, generator=torch.Generator().manual_seed(0))
    one[:, :2] += 6
    one, two = (scores.to(device).requires_grad_() for scores in (one, two))
    scores, indices = product_key_topk(one, two, k, path=path)
    assert (indices // n_keys < 2).float().mean() > 0.5
    grads = torch.randn(rows, k, generator=torch.Generator().manual_seed(7)).to(device)
    first = torch.autograd.grad(scores, (one, two), grads, retain_graph=True)
    for _ in range(19):
        again = torch.autograd.grad(scores, (one, two), grads, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
