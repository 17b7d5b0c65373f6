"""Associative recall in training: accuracy by query, a curriculum of pairs, and a base with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memlayers as ml
from memlayers.eval.models import FromCheckpoint, ModelConfig
from memlayers.train.log import read_log
from memlayers.train.run import train

SHAPE = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def data(**task) -> dict:
    return {"type": "task", "task": {"type": "mqar", "vocab_size": 24, **task}, "regime": "D"}


def lines(run) -> list[dict]:
    return read_log(Path(run.output_dir) / "log.jsonl")


def test_accuracy_counts_queries_and_the_loss_values_alone(config):
    """With nothing learned the loss of the values is near log(400), and one query in many is right by chance."""
    run = config(data={**data(n_pairs=4), "segments": 1}, loss={"answer": 1.0, "rest": 0.0}, max_steps=2)
    train(run)
    shares = {line["accuracy"] * 16 for line in lines(run)}  # 4 rows of 4 queries
    assert all(share == pytest.approx(round(share)) for share in shares)
    assert lines(run)[0]["loss"] == pytest.approx(6.0, abs=0.3)


def test_a_curriculum_of_lengths_is_one_of_pairs(config):
    section = {"segments": [1, 2, 3], "threshold": 0.001, "window": 1, "varied": False}
    run = config(
        data={**data(tokens_per_pair=8), "segment_length": 25}, curriculum=section, batch_size=16, max_steps=8
    )
    train(run)
    assert lines(run)[-1]["stage_segments"] > 1


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (
            {"n_pairs": 4, "vocab_size": 500},
            "data.task.vocab_size: ids below 500 are drawn, the model has emb",
        ),
        ({"n_pairs": 20}, "data: 1 segments of 24 tokens: vocab_size: 20 pairs"),
        ({"n_pairs": 8}, "data: 1 segments of 24 tokens: length 24 is too short for 8 pairs"),
        ({"n_pair": 8}, "data.task.n_pair: unknown field, did you mean 'n_pairs'"),
    ],
)
def test_what_does_not_fit_is_named(config, task, told):
    with pytest.raises(ml.ConfigError) as error:
        train(config(data={**data(**task), "segments": 1}))
    assert told in str(error.value)


def test_the_last_stage_is_checked_before_the_first_step(config):
    section = {"segments": [1, 40]}
    with pytest.raises(ml.ConfigError, match="data: 40 segments of 24 tokens: vocab_size"):
        train(config(data=data(tokens_per_pair=12), curriculum=section))


def test_a_random_base_is_kept_as_it_was_and_named_for_evaluation(config, base, tmp_path):
    run = config(
        model={"config": SHAPE, "tokenizer": str(base)}, data={**data(n_pairs=2), "segments": 1}, seed=3
    )
    final = train(run)
    start = Path(run.output_dir) / "start"
    recorded = json.loads((final / "memory_config.json").read_text())["base"]
    assert recorded["name_or_path"] == "base" and recorded["trained_from"] == "../start"

    before = load_file(start / "model.safetensors")
    after = load_file(final / "base" / "model.safetensors")
    assert before.keys() == after.keys() and not any(name.startswith("memlayers") for name in before)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    source = FromCheckpoint(ModelConfig(model=str(final)), seed=0)
    assert source.missing == {}
    assert torch.equal(source.base().state_dict()[name], before[name])
    assert list(ml.memories(source.untrained())) == ["stream"]

    again = config(
        model={"config": SHAPE, "tokenizer": str(base)},
        data={**data(n_pairs=2), "segments": 1},
        seed=3,
        output_dir=str(tmp_path / "again"),
        max_steps=1,
    )
    train(again)
    same = load_file(tmp_path / "again" / "start" / "model.safetensors")
    assert all(torch.equal(tensor, same[name]) for name, tensor in before.items())
