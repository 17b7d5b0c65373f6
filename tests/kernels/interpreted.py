"""Tests of Triton kernels, run in a process of their own: in Triton's interpreter, or on a GPU.

Such tests stand in files `triton_<family>.py`, which pytest does not collect by itself. They use tensors on DEVICE
and few of them on the CPU, where the interpreter is slow. A test file calls

    def test_triton_interpreted():
        run_triton("triton_<family>.py", interpret=True)

    @needs_gpu
    @pytest.mark.gpu
    def test_triton_gpu():
        run_triton("triton_<family>.py", interpret=False)
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memlayers.kernels.paths import TRITON_INSTALLED, interpreted

DEVICE = torch.device("cpu" if interpreted() else "cuda")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")


def run_triton(file: str, interpret: bool) -> None:
    """Run the tests of tests/kernels/`file` with TRITON_INTERPRET=1 or without; fail with their output."""
    if not TRITON_INSTALLED:
        pytest.skip("triton is not installed")
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV", "MEMLAYERS", "TRITON_INT"))
    }
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / file)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout
