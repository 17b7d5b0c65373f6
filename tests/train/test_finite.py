"""Weights that are no longer finite stop the run before anything of them is saved."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memlayers.train import run as run_module
from memlayers.train.checkpoints import checkpoints_in
from memlayers.train.finite import FiniteCheck
from memlayers.train.resume import check_whole
from memlayers.train.run import TrainingError, train
from tests.train.faults import nan_at_step_3
from tests.train.kill_cases import run_ranks
from tests.train.remains import assert_equal


def spoil(monkeypatch, step: int, value: float, name: str = "lm_head.weight") -> None:
    """Have a parameter hold `value` in one place after the optimizer's step `step`."""
    check = FiniteCheck.check_step

    def spoiled(self, now):
        if now == step:
            with torch.no_grad():
                self.learning[name].view(-1)[5] = value
        return check(self, now)

    monkeypatch.setattr(run_module.FiniteCheck, "check_step", spoiled)


def all_finite(out: Path) -> bool:
    tensors = [t for path in out.rglob("*.safetensors") for t in load_file(path).values()]
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_step_and_the_parameter_are_named_and_the_last_checkpoint_stays(
    config, tmp_path, monkeypatch, value
):
    train(config(checkpoint_every=2, output_dir=str(tmp_path / "straight")))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        spoil(patch, 5, value)
        with pytest.raises(
            TrainingError, match=r"step 5: lm_head\.weight is no longer finite; .*step-00000004"
        ):
            train(config(checkpoint_every=2, keep_checkpoints=1))
    (kept,) = checkpoints_in(out / "checkpoints")
    check_whole(kept)
    assert kept.name == "step-00000004"
    assert not (out / "final").exists()
    assert all_finite(out)
    train(config(checkpoint_every=2, keep_checkpoints=1), resume=True)
    assert_equal(tmp_path / "straight", out)


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), 1e38, 1e300])
@pytest.mark.parametrize("steps", [1, 3])
def test_learning_rates_that_no_config_takes(config, tmp_path, rate, steps):
    """Objects made without a check, as configs of earlier versions were."""
    run = config(max_steps=steps, checkpoint_every=1)
    section = run.optimizer.model_copy(update={"learning_rate": rate})
    with pytest.raises(
        TrainingError, match=r"step [12]: .*there is no checkpoint yet|step [23]: .*step-0000000"
    ):
        train(run.model_copy(update={"optimizer": section}))
    assert not (tmp_path / "out" / "final").exists()
    assert all_finite(tmp_path / "out")


def test_moments_that_overflow_are_not_saved(config, tmp_path, monkeypatch):
    """The weights stay finite: what is divided by infinity is 0."""
    clip = run_module.clip_gradients

    def huge(parameters, largest):
        norm = clip(parameters, largest)
        parameters[0].grad.fill_(1e30)
        return norm

    monkeypatch.setattr(run_module, "clip_gradients", huge)
    with pytest.raises(TrainingError, match=r"step 2: exp_avg_sq of .* in the optimizer is no longer finite"):
        train(config(checkpoint_every=2))
    assert not checkpoints_in(tmp_path / "out" / "checkpoints")


def table_check(rows: int = 64, width: int = 8):
    model = torch.nn.Module()
    model.table = torch.nn.Parameter(torch.randn(rows, width))
    model.dense = torch.nn.Parameter(torch.full((3,), 1e38))
    indices, values = torch.tensor([[3, 7]]), torch.ones(2, width)
    model.table.grad = torch.sparse_coo_tensor(indices, values, model.table.shape)
    return model, FiniteCheck(model, {"table": model.table}, Path("nowhere"))


def test_of_a_table_a_step_is_asked_for_the_rows_that_it_changed():
    model, check = table_check()
    check.check_step(1)  # large numbers are finite
    with torch.no_grad():
        model.table[20, 0] = math.nan
    check.check_step(2)
    with pytest.raises(TrainingError, match="step 2: table is no longer finite"):
        check.check_all(2, [])
    with torch.no_grad():
        model.table[20, 0], model.table[7, 1] = 0.0, math.inf
    with pytest.raises(TrainingError, match="step 3: table is no longer finite"):
        check.check_step(3)


@pytest.mark.slow
def test_all_processes_stop(config, tmp_path):
    assert run_ranks(config(num_processes=2, checkpoint_every=2), 2, before=nan_at_step_3) == [1, 1]
    for rank in range(2):
        told = Path(f"{tmp_path / 'out'}-rank{rank}.txt").read_text()
        assert "TrainingError: step 3: lm_head.weight is no longer finite" in told
    assert [path.name for path in checkpoints_in(tmp_path / "out" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "out" / "final").exists()
