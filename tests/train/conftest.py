"""A tiny base on disk, and runs of a few steps on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlayers.config import validate
from memlayers.train.config import TrainConfig


@pytest.fixture
def base(tiny_llama, tokenizer, tmp_path) -> Path:
    """A folder with a tiny model that has dropout, so that random states matter, and its tokenizer."""
    tiny_llama.config.attention_dropout = 0.1
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def fields(base, tmp_path):
    """A function: the fields of a run of six steps on 2 segments of 24 tokens, with changes."""

    def make(**changes) -> dict:
        data = {
            "model": {"path": str(base)},
            "memories": {"stream": {"type": "tokens", "n_tokens": 2, "segment_length": 24}},
            "train_what": "memory_and_base",
            "data": {"type": "task", "task": {"type": "passkey", "digits": 3}, "regime": "D", "segments": 2},
            "optimizer": {"learning_rate": 0.01},
            "batch_size": 4,
            "max_steps": 6,
            "log_every": 1,
            "output_dir": str(tmp_path / "out"),
        }
        return {**data, **changes}

    return make


@pytest.fixture
def config(fields):
    """As `fields`, checked."""
    return lambda **changes: validate(TrainConfig, fields(**changes))
