"""Configs that are nearly right: what comes out is a config, or a ConfigError that names the field or the file.

MEMLAYERS_FUZZ=10000 sets the number of cases of each test; the seed of a case is its number, so that any can be run again.
"""

import functools
import os
import random

import pytest
import torch
from config_fuzz import MEMORIES, STARTS, odd, overrides, resize, spoil, start, yaml_file
from transformers import LlamaConfig, LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError, Strict, validate
from memlayers.core import size
from memlayers.yaml_config import load_yaml

CASES = int(os.environ.get("MEMLAYERS_FUZZ", "200"))
ROOM = 50_000_000
"""Bytes that memories may have here: what is larger is to be refused and not built."""


def check(error: Exception, *, files: bool = False) -> None:
    """Is it an error that may come out, and does it say where?"""
    assert isinstance(error, ConfigError) or (files and isinstance(error, FileNotFoundError)), repr(error)[
        :2000
    ]
    told = str(error)
    told.encode()  # a terminal takes it
    place, colon, what = told.partition(":")
    assert place and colon and what.strip(), told[:2000]
    assert len(told) < 20_000


def of_case(case: int, classes) -> tuple[random.Random, type[Strict]]:
    rng = random.Random(f"memlayers:fuzz:{case}")
    return rng, rng.choice(list(classes))


def test_the_starts_are_right():
    for of, starts in STARTS.items():
        for fields in starts:
            assert validate(of, of(**fields).model_dump()) == of(**fields)


def test_python_values():
    for case in range(CASES):
        rng, of = of_case(case, STARTS)
        data = spoil(rng, start(rng, of), rng.randrange(1, 4))
        if case % 2 and all(isinstance(key, str) for key in data):
            make = functools.partial(of, **data)
        else:
            make = functools.partial(validate, of, data)
        try:
            make().model_dump_json()  # what is taken can be written down
        except Exception as error:
            error.add_note(f"case {case}, {of.__name__}")
            check(error)


def test_memory_configs_of_any_type():
    for case in range(CASES):
        rng, of = of_case(case, MEMORIES)
        data = rng.choice([odd(rng), {"type": odd(rng)}, spoil(rng, start(rng, of), 2)])
        try:
            ml.parse_memory_config(data, where=rng.choice(["", "memories.m"]))
        except Exception as error:
            check(error)


def test_yaml_files_and_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    for case in range(CASES):
        rng, of = of_case(case, STARTS)
        path.write_bytes(yaml_file(rng, of))
        try:
            load_yaml(path, overrides(rng, of), of)
        except Exception as error:
            error.add_note(f"case {case}, {of.__name__}")
            check(error, files=True)


@pytest.fixture
def little_memory(monkeypatch):
    """A machine with ROOM bytes free."""
    real = size.psutil.virtual_memory()
    monkeypatch.setattr(size.psutil, "virtual_memory", lambda: real._replace(available=ROOM))


def test_memories_in_a_model(little_memory):
    """Attach, forward and detach; the model is what it was."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=4096, **sizes)).eval()
    ids = torch.randint(3, 32, (2, 9))
    before, attached = model(ids).logits, 0
    for case in range(max(1, CASES // 4)):
        rng, of = of_case(case, MEMORIES)
        data = resize(rng, start(rng, of))
        try:
            config = validate(of, data)
            ml.attach(model, config, name="m")
            model(ids)
            attached += 1
        except ValueError as error:
            named = any(field in str(error) for field in of.model_fields)
            assert isinstance(error, ConfigError) or named, repr(error)
        except Exception as error:
            error.add_note(f"case {case}, {of.__name__}, {data}")
            raise
        if ml.memories(model):
            ml.detach(model)
        assert torch.equal(model(ids).logits, before), (case, data)
    assert attached
