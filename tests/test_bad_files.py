"""Files that are missing, cut, foreign or in the way: each error names the file and says what to do."""

import json

import pytest
import torch
from matrix import SEGMENT, TEXT, llama, says, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import memlayers as ml


@pytest.fixture
def saved(tmp_path):
    """A whole checkpoint, without its base."""
    ml.save(llama().model(), tmp_path / "out")
    return tmp_path / "out"


def load(folder, base=None):
    return ml.load(folder, base=base or llama().base())


def rewrite(folder, **changes):
    config = json.loads((folder / "memory_config.json").read_text())
    (folder / "memory_config.json").write_text(json.dumps({**config, **changes}))


# saving


def test_saving_where_a_file_stands(tmp_path):
    model, file = llama().model(), tmp_path / "out"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=says(str(file), "is a file, not a folder")):
            ml.save(model, path)
        with pytest.raises(NotADirectoryError, match=says(str(file), "is a file, not a folder")):
            ml.write(model, tokens(1, 4)).save(path / "state.safetensors")
    assert file.read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=says("folder", "name a file")):
        ml.write(model, tokens(1, 4)).save(tmp_path / "folder")


def test_saving_a_model_without_memory(tmp_path):
    with pytest.raises(ValueError, match=says("no memory to save", "attach")):
        ml.save(llama().base(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# loading a model


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    def offline(repo, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=says("someone/nothing", "not a folder here", "hub")):
        ml.load("someone/nothing")
    with pytest.raises(FileNotFoundError, match=says("not a folder here")):
        ml.load(tmp_path / "nothing")


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=says(str(tmp_path), "memory_config.json is missing")):
        load(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(NotADirectoryError, match=says("file", "the folder that save wrote")):
        load(file)


def test_missing_weights(saved):
    (saved / "memory.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=says("memory.safetensors is missing", "not whole")):
        load(saved)


@pytest.mark.parametrize("keep", [0, 4, 60, -1], ids=["empty", "4_bytes", "60_bytes", "all_but_one"])
def test_cut_weights(saved, keep):
    path = saved / "memory.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=says(str(path), "cut short or not a safetensors file")):
        load(saved)


def test_weights_of_another_kind(saved):
    path = saved / "memory.safetensors"
    path.write_bytes(b"PK\x03\x04 a pickle in a zip, as torch.save writes it" * 20)
    with pytest.raises(ValueError, match=says(str(path), "not a safetensors file")):
        load(saved)
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=says(str(path), "tensor", "belongs to another checkpoint")):
        load(saved)


def test_a_tensor_too_few_too_many_or_of_another_shape(saved):
    path = saved / "memory.safetensors"
    whole = load_file(path)
    name = "memlayers.stream.initial_memory"
    save_file({n: t for n, t in whole.items() if n != name}, path)
    with pytest.raises(ValueError, match=says(str(path), f"'{name}' is missing")):
        load(saved)
    save_file({**whole, "memlayers.stream.more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=says(str(path), "'memlayers.stream.more' does not belong")):
        load(saved)
    save_file({**whole, name: torch.zeros(7, 32)}, path)
    with pytest.raises(ValueError, match=says(str(path), name, "(7, 32)", "(2, 32)")):
        load(saved)


def test_a_checkpoint_for_another_base(saved):
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    narrow = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=says("memory_config.json", "hidden_size 32", "this one has 16")):
        load(saved, narrow)
    assert ml.memories(narrow) == {} and all(p.requires_grad for p in narrow.parameters())


def test_a_base_that_is_missing(saved):
    with pytest.raises(FileNotFoundError, match=says("memory_config.json", "names no base", "pass base=")):
        ml.load(saved)
    config = json.loads((saved / "memory_config.json").read_text())
    rewrite(saved, base={**config["base"], "name_or_path": "/nowhere/at/all"})
    with pytest.raises(
        FileNotFoundError, match=says("'/nowhere/at/all'", "memory_config.json", "pass base=")
    ):
        ml.load(saved)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["memory_config.json", "JSON"]),
        ("[]", ["memory_config.json", "format: this field is required"]),
        ('{"format": 1, "base": {}}', ["memory_config.json", "memories: this field is required"]),
        ('{"format": 9, "base": {}, "memories": {}}', ["memory_config.json", "format: 9"]),
    ],
    ids=["cut", "no_mapping", "no_memories", "newer_format"],
)
def test_a_config_file_that_is_wrong(saved, text, parts):
    (saved / "memory_config.json").write_text(text)
    with pytest.raises(ml.ConfigError, match=says(*parts)):
        load(saved)


def test_a_wrong_field_in_a_config_file(saved):
    rewrite(saved, memories={"stream": {"type": "tokens", "n_token": 2}})
    path = f"{saved / 'memory_config.json'}: memories.stream.n_token"
    with pytest.raises(ml.ConfigError, match=says(path, "did you mean 'n_tokens'?")):
        load(saved)
    for wrong in ([], "tokens", {"stream": None}):
        rewrite(saved, memories=wrong)
        with pytest.raises(ml.ConfigError, match=says("memory_config.json", "memories")):
            load(saved)
    rewrite(saved, base=None, memories={})
    with pytest.raises(ml.ConfigError, match=says("memory_config.json", "base")):
        load(saved)


def test_no_pickle_is_ever_read(saved):
    """A pickle beside or in place of the weights is refused, not opened."""
    weights = load_file(saved / "memory.safetensors")
    (saved / "memory.safetensors").unlink()
    torch.save(weights, saved / "memory.bin")
    with pytest.raises(FileNotFoundError, match=says("memory.safetensors is missing")):
        load(saved)
    torch.save(weights, saved / "memory.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(saved)


# loading a state


def test_state_files_that_are_missing_cut_or_foreign(tmp_path, saved):
    path = tmp_path / "alice.safetensors"
    with pytest.raises(FileNotFoundError, match=says("no memory state at", str(path))):
        ml.MemoryState.load(path)
    ml.write(llama().model(), tokens(1, TEXT), close=False).save(path)
    whole = path.read_bytes()
    for keep in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=says(str(path), "cut short or not a safetensors file")):
            ml.MemoryState.load(path)
    with pytest.raises(ValueError, match=says("memory.safetensors", "not a memory state")):
        ml.MemoryState.load(saved / "memory.safetensors")


def test_a_loaded_state_of_another_memory(tmp_path):
    path, other = tmp_path / "alice.safetensors", llama().base()
    ml.attach(other, ml.MemoryTokensConfig(n_tokens=3, segment_length=SEGMENT), name="stream")
    ml.write(other, tokens(1, TEXT)).save(path)
    with pytest.raises(ValueError, match=says("'stream'", "written by another memory")):
        llama().model()(tokens(1, 3), memory_state=ml.MemoryState.load(path))
