"""The cycle loss in training: its place in the objective, and a run of the script."""

import pytest
import torch
from matrix import llama, tokens

import memlayers as ml
from memlayers.config import ConfigError, validate
from memlayers.train.config import TrainConfig
from memlayers.train.data import Example, collate
from memlayers.train.log import read_log
from memlayers.train.objective import Objective
from memlayers.train.run import train

FIELDS = {"n_tokens": 2, "ratios": [3], "heads": 4, "depth": 2}


def test_the_objective_adds_the_cycle_loss_of_what_is_written():
    model = llama().base()
    memory = ml.attach(model, ml.ReversibleMemoryConfig(**FIELDS))
    examples = [Example(tokens(1, n)[0].tolist(), [300, 301], [302]) for n in (8, 13)]
    for regime, ids in (("D", "context_ids"), ("W", "input_ids")):
        batch = collate(examples, regime)
        plain, with_cycle = (Objective(model, [(3, 1.0)], True, cycle=c)(batch)[0] for c in (0.0, 0.5))
        mask = (batch.context_mask if regime == "D" else batch.attention_mask).bool()
        expected = plain + 0.5 * memory.extra_loss(model, getattr(batch, ids), mask)
        torch.testing.assert_close(with_cycle, expected)


def test_training_by_the_script_lowers_the_loss(fields, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("The sky is blue and the grass is green. " * 60)
    run = {
        "memories": {"past": {"type": "reversible", **FIELDS}},
        "train_what": "memory",
        "data": {"type": "text", "files": [str(prose)], "length": 18},
        "loss": {"cycle": 2.0},
        "optimizer": {"learning_rate": 0.02},
        "max_steps": 12,
    }
    final = train(validate(TrainConfig, fields(**run)))
    log = read_log(tmp_path / "out" / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"] - 1
    model = ml.load(final)
    ids, mask = ml.read_back(model, ml.write(model, tokens(1, 7) % 400))
    assert ids.shape == (1, 7) and mask.all()
    with pytest.raises(ConfigError, match=r"loss\.cycle: no memory of this model can be read back"):
        train(validate(TrainConfig, fields(loss={"cycle": 1.0}, output_dir=str(tmp_path / "no"))))


def test_a_decoder_that_nothing_teaches_is_an_error(fields, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("The sky is blue and the grass is green. " * 60)
    past = {"type": "reversible", **FIELDS, "backwards": "separate"}
    run = {"memories": {"past": past}, "data": {"type": "text", "files": [str(prose)], "length": 18}}
    with pytest.raises(ConfigError, match=r"loss\.cycle: is 0, .* decoder of memory 'past'"):
        train(validate(TrainConfig, fields(**run)))
