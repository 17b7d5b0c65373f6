"""Bases of others: code that came with them is never run nor asked about, and a pickle is not read."""

import builtins
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import run

import memlayers as ml
from memlayers.config import validate
from memlayers.loading import load_causal_lm
from memlayers.train.config import TrainConfig
from memlayers.train.model import build_model

DEMO = Path(ml.__file__).parent / "demo" / "base"
MEMORIES = "memories:\n  stream: {type: tokens, n_tokens: 2, segment_length: 16}\n"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base with a Python file that would leave a mark; nobody is asked about it."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *prompt: asked.append(prompt) or "y")
    folder = tmp_path / "base"
    shutil.copytree(DEMO, folder)
    mark = tmp_path / "mark"
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["LlamaForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.LlamaConfig", "AutoModelForCausalLM": "own.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    assert not mark.exists() and asked == []


def training(base: Path, tmp_path: Path) -> TrainConfig:
    """A training config on `base`."""
    data = {"type": "task", "task": {"type": "passkey"}, "segments": 2, "segment_length": 16}
    return validate(
        TrainConfig, {"model": {"path": str(base)}, "data": data, "output_dir": str(tmp_path / "out")}
    )


def test_wrap_of_a_base_with_code(base, tmp_path):
    (tmp_path / "memories.yaml").write_text(MEMORIES)
    code, _, err = run("wrap", base, "-c", tmp_path / "memories.yaml", "-o", tmp_path / "out")
    assert code == 1 and "needs Python code that came with it" in err
    assert "defect" not in err and not (tmp_path / "out").exists()


def test_inspect_of_a_memory_on_a_base_with_code(base, tmp_path):
    (tmp_path / "memories.yaml").write_text(MEMORIES)
    assert run("wrap", DEMO, "-c", tmp_path / "memories.yaml", "-o", tmp_path / "out")[0] == 0
    code, _, err = run("inspect", tmp_path / "out", "--base", base)
    assert code == 1 and "base" in err and "Traceback" not in err and "defect" not in err


def test_training_on_a_base_with_code(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.path: .*needs Python code"):
        build_model(training(base, tmp_path))


class Mark:
    """What a pickle runs as it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_a_pickled_base_is_not_read(tmp_path, write):
    folder, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(DEMO, folder)
    (folder / "model.safetensors").unlink()
    write({"weight": Mark(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle file .* could run code; it is not read"):
        load_causal_lm(folder)
    (tmp_path / "memories.yaml").write_text(MEMORIES)
    code, _, err = run("wrap", folder, "-c", tmp_path / "memories.yaml", "-o", tmp_path / "out")
    assert code == 1 and "pickle file" in err and "defect" not in err and not mark.exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model_type": "llama", "hidden_size": "wide"}', "{", "\udcff"]
)
def test_a_base_with_a_damaged_config(tmp_path, text):
    folder = tmp_path / "base"
    shutil.copytree(DEMO, folder)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises((OSError, ValueError)):
        load_causal_lm(folder)
