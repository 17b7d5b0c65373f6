"""The choice between the paths of a kernel family: argument, then environment variable, then device."""

import pytest
import torch

from memlayers.kernels import paths
from memlayers.kernels.paths import choose

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("MEMLAYERS_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(paths, "TRITON_INSTALLED", True)


def test_by_device():
    assert choose("f", CPU) == "cpu"
    assert choose("f", CUDA) == "triton"
    assert choose("f", META) == "reference"


def test_a_closed_form_runs_anywhere():
    """Families whose path "cpu" is plain torch: on a GPU when asked for, and by default where there is no other."""
    assert choose("f", CUDA, "cpu", closed=True) == "cpu"
    assert choose("f", META, closed=True) == "cpu"
    assert choose("f", CUDA, closed=True) == "triton"


def test_environment_then_argument(monkeypatch):
    monkeypatch.setenv("MEMLAYERS_KERNELS", "reference")
    assert choose("f", CPU) == choose("f", CUDA) == "reference"
    assert choose("f", CPU, "cpu") == "cpu"
    assert choose("f", CUDA, "triton") == "triton"
    monkeypatch.setenv("MEMLAYERS_KERNELS", "")
    assert choose("f", CPU) == "cpu"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"weighted_gather: path is 'tritn'.*reference, cpu, triton"):
        choose("weighted_gather", CPU, "tritn")
    monkeypatch.setenv("MEMLAYERS_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"f: MEMLAYERS_KERNELS is 'fast'.*reference, cpu, triton"):
        choose("f", CPU)
    assert choose("f", CPU, "cpu") == "cpu"  # the argument comes first


def test_paths_that_cannot_run_here(monkeypatch):
    with pytest.raises(ValueError, match=r"'cpu'.*on cuda:0"):
        choose("f", CUDA, "cpu")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose("f", CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("f", CPU, "triton") == "triton"
    assert choose("f", CPU) == "cpu"  # the interpreter is slow: only when asked for
    monkeypatch.setattr(paths, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="not installed"):
        choose("f", CPU, "triton")
    with pytest.raises(ValueError, match="not installed"):
        choose("f", CUDA)
