"""A writer that learns to write, trained by the same script from YAML: what learns, resumed, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memlayers as ml
from memlayers.checkpoint import WEIGHTS
from memlayers.train.run import train

WRITER = {
    "steps": 2,
    "learning_rate": 0.01,
    "segment_length": 24,
    "learned_steps": True,
    "token_weights": True,
}


def notes(**writer) -> dict:
    """Changes of a config: a LoRA memory whose writer learns, on items of three segments of 24 tokens."""
    task = {"type": "passkey", "digits": 3}
    return {
        "memories": {"notes": {"type": "lora", "r": 2, "lora_alpha": 4.0, "writer": {**WRITER, **writer}}},
        "data": {"type": "task", "task": task, "regime": "D", "segments": 3, "segment_length": 24},
    }


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("outer_gradient", ["maml", "fomaml", "reptile"])
def test_all_of_the_writer_learns(config, outer_gradient):
    run = config(**notes(outer_gradient=outer_gradient), max_steps=2, schedule={"warmup_steps": 0})
    before = learned(
        train(run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"learning_rate": 1e-12})}))
    )
    after = learned(train(run.model_copy(update={"overwrite": True})))
    still = {name for name in after if torch.allclose(before[name], after[name], rtol=1e-6, atol=1e-7)}
    assert any(".adapters." in name for name in after) and any("log_rates" in name for name in after)
    # First-order gradients do not say how tokens should have been weighed.
    expected = set() if outer_gradient == "maml" else {name for name in after if "token_weights" in name}
    assert still == expected


def test_a_resumed_run_is_the_same(config, tmp_path):
    whole = config(**notes(), max_steps=4, checkpoint_every=2, keep_checkpoints=2)
    full = learned(train(whole))
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
    resumed = learned(train(whole, resume=True))
    assert full.keys() == resumed.keys()
    for name, tensor in full.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_loss_of_the_context_is_refused(config):
    with pytest.raises(
        ml.ConfigError, match=r"loss\.context: this memory writes the context by gradient steps"
    ):
        train(config(**notes(), loss={"context": 0.5}))


def test_reentrant_checkpointing_is_refused(config):
    with pytest.raises(
        ValueError, match="gradient_checkpointing: inner gradients do not go through reentrant"
    ):
        train(config(**notes(), gradient_checkpointing="reentrant"))
