"""Wrong fields are named with their full path, before anything is loaded."""

import pytest

import memlayers as ml
from memlayers.config import ConfigError, validate
from memlayers.core import size
from memlayers.train.config import TrainConfig
from memlayers.train.model import build_model
from memlayers.train.run import train
from memlayers.train.sources import make_source


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("batch_sise", 4, "batch_sise: unknown field, did you mean 'batch_size'?"),
        (
            "optimizer.learning_rat",
            0.1,
            "optimizer.learning_rat: unknown field, did you mean 'learning_rate'?",
        ),
        ("batch_size", "four", "batch_size:"),
        ("batch_size", 4.5, "batch_size:"),
        ("data.regime", "X", "data.regime:"),
        ("data.type", "tsak", "data: type 'tsak' is not one of"),
        ("data.task.digit", 5, "data.task.digit: unknown field, did you mean 'digits'?"),
        ("memories.stream.n_token", 5, "memories.stream.n_token: unknown field, did you mean 'n_tokens'?"),
        ("memories.stream.type", "tokns", "memories.stream.type: 'tokns' is not a kind"),
        ("data.segments", None, "data.segments: give a number of segments here, or a curriculum"),
        ("train_what", "memory_and_lora", "lora: give this section"),
        ("curriculum", {"segments": [2, 1]}, "curriculum.segments: must be a rising list"),
        (
            "curriculum",
            {"segments": {"start": 3, "stop": 2}},
            "curriculum.segments.stop: must not be below start",
        ),
        (
            "curriculum",
            {"segments": {"stap": 2, "stop": 3}},
            "curriculum.segments.stap: unknown field, did you",
        ),
        (
            "curriculum",
            {"segments": 3},
            "curriculum.segments: needs a list of whole numbers, or start and stop",
        ),
        ("lora", {"target_modules": "q_proj"}, "lora.target_modules: needs a list of names"),
        ("model", {"config": {"model_type": "llama"}}, "model.tokenizer: a model from config needs one"),
        ("model", {}, "model.path: give either path"),
        ("optimizer.values", {"state": "float16"}, "optimizer.values.state:"),
        ("optimizer.values", {"betas": [0.9, 1.0]}, "optimizer.values.betas.1:"),
        (
            "optimizer.values",
            {"learning_rat": 1},
            "optimizer.values.learning_rat: unknown field, did you mean",
        ),
    ],
)
def test_wrong_field(fields, path, value, told):
    data = fields()
    here, (*way, last) = data, path.split(".")
    for key in way:
        here = here[key]
    here[last] = value
    with pytest.raises(ml.ConfigError) as error:
        validate(TrainConfig, data)
    assert told in str(error.value)


def test_several_processes_refuse_reentrant_checkpointing(fields):
    with pytest.raises(ml.ConfigError, match="gradient_checkpointing: reentrant"):
        validate(TrainConfig, fields(num_processes=2, gradient_checkpointing="reentrant"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_processes": 2}, "num_processes: the config says 2, 1 started"),
        ({"memories": {}}, "data.segment_length: needed"),
        ({"memories": {}, "train_what": "memory"}, "train_what: nothing would learn"),
        ({"trackers": ["no_such_tracker"]}, "trackers: accelerate does not know one of ['no_such_tracker']"),
        ({"model": {"path": "/no/such/model"}}, "model.path: no tokenizer at '/no/such/model'"),
    ],
)
def test_what_does_not_fit_together(config, changes, told):
    with pytest.raises((ml.ConfigError, FileNotFoundError)) as error:
        train(config(**changes))
    assert told in str(error.value)


def test_regimes_and_models(fields, config):
    data = fields()["data"]
    with pytest.raises(ml.ConfigError, match=r"data\.regime: F is full attention"):
        train(config(data={**data, "regime": "F"}))
    with pytest.raises(ml.ConfigError, match=r"data\.regime: D asks with memory alone"):
        train(config(data={**data, "segment_length": 24}, memories={}))
    with pytest.raises(ml.ConfigError, match="too short"):
        train(config(data={**data, "segments": 1, "segment_length": 8}))
    lora = {"target_modules": ["no_such_layer"]}
    with pytest.raises(ml.ConfigError, match=r"lora\.target_modules"):
        train(config(train_what="memory_and_lora", lora=lora))


def test_the_configs_of_the_repository_are_valid():
    from pathlib import Path

    from memlayers.yaml_config import load_yaml

    files = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))
    assert files
    for file in files:
        load_yaml(file, [], TrainConfig)
        assert f"--config configs/train/{file.name}" in file.read_text().split("\nmodel:")[0]


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({"batch_size": 1_000_000}, {}),
        ({}, {"segment_length": 2**24}),
        ({}, {"segments": 100_000, "segment_length": 2**20}),
        ({"batch_size": 1_000_000}, {"type": "text", "files": ["none.txt"], "length": 64}),
        ({}, {"type": "jsonl", "files": ["none.jsonl"], "length": 2**24}),
    ],
    ids=range(5),
)
def test_a_batch_that_no_machine_holds_is_not_made(config, fields, tokenizer, changes, data):
    made = data if "type" in data else {**fields()["data"], **data}
    with pytest.raises(
        ConfigError, match=r"batch_size: [\d,]+ items of [\d,]+ tokens are more than 16,777,216"
    ):
        make_source(config(data=made, **changes), tokenizer, 24)


def test_uses_that_no_machine_holds(config):
    with pytest.raises(ConfigError, match=r"data\.uses: 1,000,000 of 1,000,000 procedures"):
        config(data={"type": "procedures", "n": 1_000_000, "uses": 1_000_000})


RANDOM = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"num_hidden_layers": 10**9}, "model.config.num_hidden_layers: at most 10,000"),
        ({"hidden_size": 2**22, "intermediate_size": 2**22}, "model.config.hidden_size: lower it"),
        ({"vocab_size": 10**15}, "model.config"),
        ({"num_attention_heads": 0}, "model.config"),
        ({"num_attention_heads": "two"}, "model.config"),
        ({"model_type": ["llama"]}, "model.config"),
        ({"model_type": "lama"}, "model.config"),
        ({"hidden_act": "none"}, "model.config"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, ""),
    ],
    ids=range(9),
)
def test_a_random_model_that_cannot_be_built(config, base, other, told):
    model = {"config": {**RANDOM, **other}, "tokenizer": str(base)}
    run = config(model=model, memories={}, data={"type": "text", "files": ["a.txt"]})
    if told:
        with pytest.raises(ConfigError) as error:
            build_model(run)
        assert str(error.value).startswith(told)
    else:
        build_model(run)  # what was named is not looked for


def test_a_lora_that_no_machine_holds(config, monkeypatch):
    real = size.psutil.virtual_memory()
    monkeypatch.setattr(size.psutil, "virtual_memory", lambda: real._replace(available=10_000_000))
    with pytest.raises(ConfigError, match=r"lora\.r: lower it: a LoRA on \d+ layers takes [\d,]+ bytes"):
        build_model(config(lora={"r": 65_536}, train_what="memory_and_lora"))


def test_a_name_that_no_memory_can_have(config):
    with pytest.raises(ConfigError, match="memories: 'a b' cannot name a memory"):
        build_model(config(memories={"a b": {"type": "tokens", "n_tokens": 2, "segment_length": 24}}))
