"""What every path of weighted_gather is measured with: cases, the truth by brute force, tolerances."""

import torch

from memlayers.kernels.weighted_gather import weighted_gather

# (n_rows, value_dim), shape of the indices
CASES = {
    "heads and tokens": ((11, 5), (2, 3, 6)),
    "odd width, many reads": ((40, 37), (3, 19)),
    "no leading shape": ((7, 16), (5,)),
    "one row": ((1, 3), (2, 4)),
    "one column": ((6, 1), (2, 3)),
    "wide": ((5, 1100), (2, 3)),
    "empty bags": ((7, 3), (2, 0)),
    "no bags": ((7, 3), (0, 4)),
    "empty table": ((0, 3), (2, 0)),
}

# Largest error of one rounding to the dtype, relative to the element; sums run in float32 or better.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(case: str, dtype=torch.float64, index_dtype=torch.int64, device="cpu"):
    """table, indices and weights of a case, and a gradient of the result; the indices repeat within bags too."""
    (n_rows, width), shape = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    table = torch.randn(n_rows, width, generator=generator).to(dtype)
    indices = torch.randint(max(1, n_rows), shape, generator=generator, dtype=index_dtype)
    weights = torch.randn(shape, generator=generator).to(dtype)
    grad = torch.randn(*shape[:-1], width, generator=generator).to(dtype)
    return tuple(tensor.to(device) for tensor in (table, indices, weights, grad))


def brute_force(table, indices, weights, grad):
    """The result and the gradients to table and weights in float64, read by read."""
    shape, n, width = indices.shape[:-1], indices.shape[-1], table.shape[1]
    indices = indices.cpu().reshape(shape.numel(), n)
    table = table.detach().cpu().double()
    weights = weights.detach().cpu().double().reshape(indices.shape)
    grad = grad.cpu().double().reshape(len(indices), width)
    out, grad_table, grad_weights = (torch.zeros_like(like) for like in (grad, table, weights))
    for bag, rows in enumerate(indices.tolist()):
        for read, row in enumerate(rows):
            if 0 <= row < len(table):  # Triton reads other rows as zeros
                out[bag] += weights[bag, read] * table[row]
                grad_table[row] += weights[bag, read] * grad[bag]
                grad_weights[bag, read] = table[row] @ grad[bag]
    return out.view(*shape, width), grad_table, grad_weights.view(*shape, n)


def run(table, indices, weights, grad, path, sparse=False):
    """The result and the gradients, the table's as it comes."""
    table, weights = table.detach().requires_grad_(), weights.detach().requires_grad_()
    out = weighted_gather(table, indices, weights, sparse=sparse, path=path)
    return out.detach(), *torch.autograd.grad(out, (table, weights), grad)


def check_equal(actual, exact, rounding, name, tolerance=None) -> None:
    """Elementwise: within `rounding` of the element plus `tolerance` of the largest element of the result."""
    if tolerance is None:  # the bar for float32; eps * a few for float64
        tolerance = 1e-14 if actual.dtype == torch.float64 else 1e-6
    error = (actual.cpu().double() - exact).abs()
    limit = rounding * exact.abs() + tolerance * exact.abs().max() if exact.numel() else exact
    assert actual.shape == exact.shape, name
    assert (error <= limit).all(), f"{name}: error {error.max():.2e}, largest element {exact.abs().max():.2e}"


def check_parity(case, dtype, index_dtype, sparse, path, device="cpu", roundings=ROUNDING) -> None:
    """`path` against brute force: the result, both gradients, their dtypes, and what a sparse gradient holds."""
    inputs = make(case, dtype, index_dtype, device)
    out, grad_table, grad_weights = run(*inputs, path, sparse)
    exact_out, exact_table, exact_weights = brute_force(*inputs)
    assert out.dtype == grad_table.dtype == grad_weights.dtype == dtype
    assert grad_table.is_sparse == sparse
    if sparse:
        check_rows(grad_table, inputs[1])
        grad_table = grad_table.to_dense()
    check_equal(out, exact_out, roundings[dtype], "result")
    check_equal(grad_table, exact_table, roundings[dtype], "gradient to the table")
    check_equal(grad_weights, exact_weights, roundings[dtype], "gradient to the weights")


def check_rows(grad_table, indices) -> None:
    """A sparse gradient is coalesced and holds the rows read, each once, in order, and no others."""
    assert grad_table.is_coalesced()
    assert grad_table.indices()[0].tolist() == sorted(set(indices.flatten().tolist()))
    with torch.sparse.check_sparse_tensor_invariants():  # the claims made when it was built
        torch.sparse_coo_tensor(
            grad_table.indices(), grad_table.values(), grad_table.shape, is_coalesced=True
        )
