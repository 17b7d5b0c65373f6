"""A fixture of the kernels' tests: import it where torch.empty is to be poisoned."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so what a path forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
