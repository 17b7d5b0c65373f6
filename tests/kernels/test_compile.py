"""Every Triton kernel compiles for GPUs that are not here, without spills; the committed table lists them all."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from memlayers.kernels.paths import TRITON_INSTALLED

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "eval" / "speed" / "results" / "kernel_resources.md"


def missing() -> str | None:
    """Why kernels cannot be compiled for other machines here; None if they can."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 6):
        return f"triton {version('triton')} gives no log of ptxas and has no linker for AMD; 3.6 has both"
    backends = Path(importlib.util.find_spec("triton").origin).parent / "backends"
    for tool in ("nvidia/bin/ptxas", "nvidia/bin/ptxas-blackwell", "amd"):
        if not (backends / tool).exists():
            return f"this triton comes without {tool}"
    return None


def family_files() -> list[Path]:
    """A family has its kernels in triton.py, or in several files beside it."""
    return sorted((ROOT / "kernels").glob("*/triton*.py"))


@pytest.mark.full
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(target, tmp_path):
    """In a process of its own: a kernel that the interpreter took over cannot be compiled any more."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST"))}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "memlayers.eval.speed.kernel_resources", "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["family"] for row in rows} == {path.parent.name for path in family_files()}
    assert [row for row in rows if row["spills"] > 0] == []
    assert [row for row in rows if not 0 < row["registers"] <= 255] == []


def test_every_kernel_is_in_the_table():
    """A function `<name>_kernel` is one that is launched. The table is made by kernel_resources.py."""
    listed = set(
        re.findall(r"^\| (\w+) \| (\w+?_kernel)_\w+ \|.*\| (sm_\d+|gfx942) \|", TABLE.read_text(), re.M)
    )
    expected = {
        (path.parent.name, kernel, target)
        for path in family_files()
        for kernel in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    assert expected and listed == expected
