"""A run that was interrupted ends where it would have ended, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import memlayers as ml
from memlayers.files import DamagedFile
from memlayers.train import run as run_module
from memlayers.train.run import train
from memlayers.train.snapshot import random_state, restore_random_state
from tests.train.remains import assert_equal


def varied(fields, out, **changes) -> dict:
    """A run in which every kind of state matters: dropout, curriculum, schedule, averages over log_every."""
    data = {k: v for k, v in fields()["data"].items() if k != "segments"}
    data["task"] = {"type": "passkey", "digits": 1}
    return {
        "data": data,
        "curriculum": {"segments": [2, 3, 4], "threshold": 0.1, "window": 2},
        "schedule": {"type": "linear", "warmup_steps": 3},
        "output_dir": str(out),
        "max_steps": 40,
        "log_every": 3,
        "checkpoint_every": 4,
        **changes,
    }


def train_interrupted(run, interrupted_at: int, monkeypatch) -> None:
    """The run is stopped before step `interrupted_at` + 1, and then goes on from its newest checkpoint."""

    def stop(*args, draw=run_module.Curriculum.draw):
        if args[1] == interrupted_at:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Curriculum, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    torch.rand(7), random.random()
    train(run, resume=True)


@pytest.mark.parametrize("interrupted_at", [4, 17])
def test_interrupted_equals_uninterrupted(config, fields, tmp_path, monkeypatch, interrupted_at):
    train(config(**varied(fields, tmp_path / "straight")))
    train_interrupted(config(**varied(fields, tmp_path / "broken")), interrupted_at, monkeypatch)
    stages = {
        json.loads(line)["stage_segments"]
        for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    }
    assert len(stages) > 1
    assert_equal(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("state", ["float32", "bfloat16", "row"])
def test_interrupted_with_row_sparse_tables(config, fields, tmp_path, monkeypatch, state):
    """Moments of the rows, their step counts and the random bits of rounding come back too."""
    memory = {"type": "product_key", "n_keys": 16, "heads": 2, "top_k": 3, "key_dim": 8, "dropout": 0.1}
    changes = {
        "memories": {"facts": memory},
        "train_what": "memory",
        "data": {**fields()["data"], "regime": "F", "segment_length": 24},
        "optimizer": {"learning_rate": 0.01, "values": {"state": state, "learning_rate": 0.02}},
        "schedule": {"type": "linear", "warmup_steps": 3},
        "max_steps": 10,
        "log_every": 3,
        "checkpoint_every": 4,
    }
    train(config(**fields(**changes, output_dir=str(tmp_path / "straight"))))
    train_interrupted(config(**fields(**changes, output_dir=str(tmp_path / "broken"))), 7, monkeypatch)
    assert_equal(tmp_path / "straight", tmp_path / "broken")
    newest = tmp_path / "broken" / "checkpoints" / "step-00000010"
    saved = load((newest / "optimizer.safetensors").read_bytes())
    moments = {key: tensor for key, tensor in saved.items() if key.endswith("facts.values")}
    shapes = {"row_steps": (256,), "exp_avg": (256, 32), "exp_avg_sq": (256, 1 if state == "row" else 32)}
    assert {key.split("/")[0]: tuple(tensor.shape) for key, tensor in moments.items()} == shapes
    dtype = torch.bfloat16 if state == "bfloat16" else torch.float32
    assert all(tensor.dtype == dtype for key, tensor in moments.items() if "exp_avg" in key)


def wait_for(condition, process, what: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the run ended before {what}"
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.0005)


def kill_after_steps(process, out: Path, steps: int) -> None:
    """SIGKILL some time after `steps` further steps."""

    def taken() -> int:
        return len((out / "timing.jsonl").read_text().splitlines()) if (out / "timing.jsonl").exists() else 0

    before = taken()
    wait_for(lambda: taken() >= before + steps, process, f"{steps} steps")
    time.sleep(random.random() * 0.02)
    os.kill(process.pid, signal.SIGKILL)


def half_written_checkpoints(out: Path) -> list[Path]:
    folder = out / "checkpoints"
    return list(folder.glob(".tmp-*")) if folder.is_dir() else []


def kill_in_checkpoint(process, out: Path) -> None:
    """SIGKILL while a checkpoint is half-written: stop the process, look, and go on if it was already done."""

    def half_written() -> bool:
        if not half_written_checkpoints(out):
            return False
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.01)
        if half_written_checkpoints(out):
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    wait_for(half_written, process, "half-written checkpoint")
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_kill_9_at_five_random_moments(config, fields, tmp_path):
    fork = multiprocessing.get_context("forkserver")  # imports once, then forks a fresh process for each life
    fork.set_forkserver_preload(["memlayers.train.run"])
    changes = {"log_every": 1, "max_steps": 100}
    straight = config(**varied(fields, tmp_path / "straight", **changes))
    killed = config(**varied(fields, tmp_path / "killed", **changes))
    out = tmp_path / "killed"

    def life(run, resume=False):
        process = fork.Process(target=train, args=(run, resume))
        process.start()
        return process

    reference = life(straight)
    for moment in (3, "checkpoint", 9, "checkpoint", 6):
        process = life(killed, resume=True)
        if moment == "checkpoint":
            kill_in_checkpoint(process, out)
        else:
            kill_after_steps(process, out, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if moment == "checkpoint":
            assert half_written_checkpoints(out)
    process = life(killed, resume=True)
    process.join()
    reference.join()
    assert process.exitcode == reference.exitcode == 0
    assert not half_written_checkpoints(out)
    assert_equal(tmp_path / "straight", out)


def test_resume_and_overwrite(config, capsys):
    run = config(checkpoint_every=2)
    train(run, resume=True)
    assert "starting from step 0" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="already has 2 checkpoints"):
        train(run)
    train(run, resume=True)
    assert "resuming from" in capsys.readouterr().out
    longer = config(checkpoint_every=2, max_steps=8)
    train(longer, resume=True)
    log = Path(run.output_dir) / "log.jsonl"
    assert len(log.read_text().splitlines()) == 8
    with pytest.raises(ml.ConfigError, match=r"^optimizer\.learning_rate: .* was 0\.01, is 0\.02"):
        train(config(optimizer={"learning_rate": 0.02}), resume=True)
    train(config(overwrite=True))
    assert len(log.read_text().splitlines()) == 6
    lines = log.read_text()
    log.write_text("")
    with pytest.raises(DamagedFile, match="the log was cut or deleted"):
        train(run, resume=True)
    log.write_text(lines.replace("1", "2", 1))
    with pytest.raises(DamagedFile, match=r"log\.jsonl is not as it was when the checkpoint was written"):
        train(run, resume=True)
    train(run, resume=True, verify=False)


def test_a_field_that_is_younger_than_the_checkpoint_has_its_default(config):
    run = config(checkpoint_every=2, max_steps=2)
    train(run)
    (state,) = Path(run.output_dir).glob("checkpoints/*/state.json")
    data = json.loads(state.read_text())
    del data["config"]["optimizer"]["weight_decay"], data["config"]["background"]
    state.write_text(json.dumps(data))
    train(config(checkpoint_every=2, max_steps=4), resume=True, verify=False)
    assert len((Path(run.output_dir) / "log.jsonl").read_text().splitlines()) == 4


def test_random_states_come_back():
    tensors, numbers = random_state()
    numbers = json.loads(json.dumps(numbers))
    import numpy as np

    drawn = random.random(), np.random.rand(), np.random.randn(), torch.rand(3)
    restore_random_state(tensors, numbers)
    again = random.random(), np.random.rand(), np.random.randn(), torch.rand(3)
    assert drawn[:3] == again[:3]
    assert torch.equal(drawn[3], again[3])
