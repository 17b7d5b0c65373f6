"""Short runs of everything a config can ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlayers as ml
from memlayers.train.log import read_log
from memlayers.train.resume import check_whole
from memlayers.train.run import TrainingError, train

ROOT = Path(__file__).resolve().parents[2]

FACTS = {
    "memories": {"facts": {"type": "product_key", "n_keys": 16, "heads": 2, "top_k": 3, "key_dim": 8}},
    "optimizer": {"learning_rate": 0.01, "values": {"learning_rate": 0.02}},
}
"""A product-key memory whose table has an optimizer and row-sparse gradients of its own; wants regime F."""


def with_memory(fields, memory: str) -> dict:
    """Changes of a config: the memory tokens it has, or `FACTS`."""
    if memory == "tokens":
        return {}
    return {**FACTS, "data": {**fields()["data"], "regime": "F", "segment_length": 24}}


def lines(config) -> list[dict]:
    return read_log(Path(config.output_dir) / "log.jsonl")


def test_what_a_run_leaves(config, base):
    run = config(trackers=["tensorboard"], checkpoint_every=2, keep_checkpoints=2)
    final = train(run)
    out = Path(run.output_dir)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "accuracy", "gradient_norm", "learning_rate", "stage_segments", "tokens"} <= lines(run)[
        0
    ].keys()
    assert [json.loads(line)["step"] for line in (out / "timing.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert sorted(path.name for path in (out / "checkpoints").glob("*step*")) == [
        "step-00000004",
        "step-00000006",
    ]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.rglob("events.out.tfevents.*"))
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert len(AutoTokenizer.from_pretrained(final)) == 400

    model, start = ml.load(final), AutoModelForCausalLM.from_pretrained(base)
    trained = load_file(out / "checkpoints" / "step-00000006" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_training_learns(config, fields):
    data = {**fields()["data"], "task": {"type": "passkey", "digits": 1}}
    run = config(data=data, max_steps=60, log_every=20, optimizer={"learning_rate": 0.01}, batch_size=16)
    train(run)
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < 0.75 * losses[0]


def test_memory_alone_leaves_the_base_as_it_was(config, base):
    run = config(train_what="memory")
    model, start = ml.load(train(run)), AutoModelForCausalLM.from_pretrained(base).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in start.items())
    assert not (Path(run.output_dir) / "final" / "base").exists()
    torch.manual_seed(0)
    assert all(line["gradient_norm"] > 0 for line in lines(run))


def test_lora_beside_memory(config, base):
    run = config(
        train_what="memory_and_lora", lora={"r": 2, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}
    )
    final = train(run)
    adapter = load_file(final / "adapters" / "lora" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    checkpoint = load_file(Path(run.output_dir) / "checkpoints" / "step-00000006" / "model.safetensors")
    state = ml.load(final).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoint.items())
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    key = "model.layers.0.self_attn.q_proj"
    assert torch.equal(state[f"{key}.base_layer.weight"], plain[f"{key}.weight"])


@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4.0}])
def test_the_full_attention_baseline_is_a_plain_checkpoint(config, fields, base, lora):
    data = {**fields()["data"], "regime": "F", "segment_length": 24}
    what = "memory_and_lora" if lora else "memory_and_base"
    run = config(memories={}, data=data, train_what=what, lora=lora)
    final = train(run)
    model, start = AutoModelForCausalLM.from_pretrained(final), AutoModelForCausalLM.from_pretrained(base)
    assert model.state_dict().keys() == start.state_dict().keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], start.state_dict()[name])


def test_training_goes_on_from_a_memlayers_folder(config):
    first = train(config())
    run = config(model={"path": str(first)}, memories={}, output_dir=str(first.parent / "second"))
    second = ml.load(train(run))
    assert list(ml.memories(second)) == ["stream"]
    before = ml.load(first)
    assert not torch.equal(
        second.memlayers["stream"].initial_memory, before.memlayers["stream"].initial_memory
    )
    with pytest.raises(ml.ConfigError, match=r"memories\.stream: .* already has a memory"):
        train(config(model={"path": str(first)}, output_dir=str(first.parent / "third")))


def test_a_model_with_random_weights(config, base):
    shape = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 400,
        "n_positions": 64,
    }
    final = train(config(model={"config": shape, "tokenizer": str(base)}))
    assert type(ml.load(final)).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("regime", ["D", "W"])
@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("what", ["memory", "memory_and_base"])
def test_gradient_checkpointing_changes_nothing(config, fields, tmp_path, regime, mode, what):
    data = {**fields()["data"], "regime": regime}
    plain = config(max_steps=2, data=data, train_what=what)
    other = config(
        max_steps=2,
        data=data,
        train_what=what,
        gradient_checkpointing=mode,
        output_dir=str(tmp_path / "other"),
    )
    train(plain)
    train(other)
    for a, b in zip(lines(plain), lines(other)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


def test_bf16_stays_near_float32(config, tmp_path):
    plain, bf16 = config(), config(precision="bf16", output_dir=str(tmp_path / "bf16"))
    train(plain)
    final = train(bf16)
    assert lines(bf16)[0]["loss"] == pytest.approx(lines(plain)[0]["loss"], rel=0.05)
    assert lines(bf16)[0]["loss"] != lines(plain)[0]["loss"]
    assert ml.load(final).lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("memory", ["tokens", "facts"])
def test_accumulation_equals_a_larger_batch(config, fields, base, tmp_path, memory):
    change_config(base, attention_dropout=0.0)
    changes = {"max_steps": 3, **with_memory(fields, memory)}
    large = config(batch_size=8, **changes)
    small = config(batch_size=4, gradient_accumulation=2, output_dir=str(tmp_path / "small"), **changes)
    train(large)
    train(small)
    for a, b in zip(lines(large), lines(small)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


def test_curriculum_advances_and_stop_at_ends_the_run(config, fields):
    data = {k: v for k, v in fields()["data"].items() if k != "segments"}
    data["task"] = {"type": "passkey", "digits": 1}
    section = {"segments": [2, 3], "threshold": 0.01, "window": 2, "varied": False}
    run = config(data=data, curriculum=section, stop_at=0.01, max_steps=400, batch_size=32)
    train(run)
    stages = [line["stage_segments"] for line in lines(run)]
    assert stages == sorted(stages)
    assert set(stages) == {2, 3}
    assert len(stages) < 400


@pytest.mark.parametrize("kind", ["text", "questions", "questions in regime D"])
def test_other_data(config, tmp_path, kind):
    (tmp_path / "a.txt").write_text("The tree by the river tells of a house. " * 100)
    line = {"context": "The tree has 7 leaves. " * 3, "question": " Leaves:", "answer": " 7"}
    (tmp_path / "a.jsonl").write_text((json.dumps(line) + "\n") * 5)
    asked = {"type": "jsonl", "files": [str(tmp_path / "a.jsonl")], "length": 100}
    data = {
        "text": {"type": "text", "files": [str(tmp_path / "a.txt")], "length": 60},
        "questions": {**asked, "regime": "W"},
        "questions in regime D": asked,
    }[kind]
    run = config(data=data, max_steps=12)
    train(run)
    assert lines(run)[-1]["loss"] < lines(run)[0]["loss"]
    assert lines(run)[0]["stage_segments"] is None


def test_weights_of_the_loss(config, fields, base, tmp_path):
    """The three parts add up: context and rest in regime W are what the loss of a sequence is made of."""
    change_config(base, attention_dropout=0.0)
    data = {**fields()["data"], "regime": "W"}
    parts = ["context", "rest", "answer"]
    found = {}
    for name, weights in {
        **{p: {p: 1.0} for p in parts},
        "sum": {"context": 1.0, "rest": 2.0, "answer": 3.0},
    }.items():
        loss = {**dict.fromkeys(parts, 0.0), **weights}
        run = config(data=data, loss=loss, max_steps=1, output_dir=str(tmp_path / name))
        train(run)
        found[name] = lines(run)[0]["loss"]
    assert found["sum"] == pytest.approx(found["context"] + 2 * found["rest"] + 3 * found["answer"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(config, base):
    run = config(clip=None, checkpoint_every=1, max_steps=20)
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(TrainingError, match=r"step \d+: loss (nan|inf)"):
        train(run)
    newest = sorted((Path(run.output_dir) / "checkpoints").glob("step-*"))[-1]
    check_whole(newest)
    assert not (Path(run.output_dir) / "final").exists()


def change_config(base: Path, **fields) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def start(arguments: list[str], launcher: tuple[str, ...] = (), **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train" / "run.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_errors_on_the_command_line_are_one_paragraph(fields, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields()))
    result = start(["--config", str(path), "optimizer.learning_rat=1"])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: optimizer.learning_rat: unknown field")


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["tokens", "facts"])
def test_two_processes_equal_one_with_the_whole_batch(fields, config, base, tmp_path, memory):
    change_config(base, attention_dropout=0.0)
    changes = with_memory(fields, memory)
    alone = config(batch_size=8, output_dir=str(tmp_path / "alone"), **changes)
    train(alone)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields(num_processes=2, batch_size=4, checkpoint_every=3, **changes)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = start(["--config", str(path), "--debug"], launcher, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr[-3000:]
    out = tmp_path / "out"
    for a, b in zip(lines(alone), read_log(out / "log.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        usage = [key for key in a if key.startswith("usage/")]
        assert bool(usage) == (memory == "facts")
        for key in usage:  # the reads of both processes together; rounding may tip a choice of a slot
            assert a[key] == pytest.approx(b[key], rel=0.05, abs=0.02), key
    newest = out / "checkpoints" / "step-00000006"
    assert (newest / "random-1.safetensors").is_file()
