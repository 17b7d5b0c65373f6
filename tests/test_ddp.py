"""Two processes train one memory (DDP over gloo): HF Trainer as it is, and a loss of what was written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_script import LENGTHS, SETTINGS
from matrix import KINDS

SCRIPT = Path(__file__).with_name("ddp_script.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
"""Which chooses a free port."""
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)]),
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_each_kind(tmp_path):
    """Texts of another length on each rank in each step, some too short to be written. One pair of processes runs all."""
    environment = os.environ | ENVIRONMENT
    done = subprocess.run([*LAUNCH, str(tmp_path / "out")], env=environment, capture_output=True, text=True)
    files = [tmp_path / f"out.{rank}" for rank in (0, 1)]
    lines = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    errors = {f"{line['kind']}, {line['setting']}": line["error"] for line in lines if line["error"]}
    assert not errors and done.returncode == 0, f"{errors}\n{done.stderr[-3000:]}"

    trained = [line for line in lines if line["setting"] in SETTINGS]
    written = [line for line in lines if line["setting"] not in SETTINGS]
    assert len(trained) == 2 * len(SETTINGS) * sum(kind.learns for kind in KINDS)
    assert len(written) == 2 * sum(kind.learns and kind.stateful for kind in KINDS)
    for line in trained:
        assert line["lengths"] == [lengths[line["rank"]] for lengths in LENGTHS]
        assert line["steps"] == len(LENGTHS)
        assert line["moved"] == line["of"] > 0, line
        assert not line["ranks differ"] and not line["base moved"], line
    for line in written:
        assert line["gradient"] and line["far"] < 1e-5, line
