"""What the tests of `RowSparseAdamW` share: a small table, and gradients that read some of its rows."""

import torch
from torch import nn

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
