"""Contract 9: save → load is exact, safetensors and JSON only, nothing half-written stays."""

import json
import os

import pytest
import torch
from matrix import TEXT, cases, llama, tokens
from safetensors.torch import load_file, save_file

import memlayers as ml

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@torch.no_grad()
@cases(scope="all")
def test_save_then_load_is_exact(case, tmp_path):
    model, ids = case.model(), case.tokens(2, TEXT)
    ml.save(model, tmp_path / "out")
    loaded = ml.load(tmp_path / "out", base=case.base())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert list(ml.memories(loaded)) == list(ml.memories(model))
    assert {n: m.config for n, m in ml.memories(loaded).items()} == case.kind.configs
    for (name, parameter), (other_name, other) in zip(
        ml.memory_parameters(model), ml.memory_parameters(loaded), strict=True
    ):
        assert name == other_name and torch.equal(parameter, other)
    assert files_of(tmp_path / "out") == ["README.md", "memory.safetensors", "memory_config.json"]


@torch.no_grad()
@cases()
def test_save_with_the_base(case, tmp_path):
    model, ids = case.model(freeze_base=False), case.tokens(2, TEXT)
    for _, parameter in model.named_parameters():
        parameter.mul_(1.01)  # as if trained: the recorded base would not do
    ml.save(model, tmp_path / "out", save_base=True)
    loaded = ml.load(tmp_path / "out").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not any(key.startswith("memlayers") for key in load_file(tmp_path / "out/base/model.safetensors"))
    assert not [name for name in files_of(tmp_path) if os.path.splitext(name)[1] in PICKLES]


@torch.no_grad()
def test_the_base_is_found_by_its_recorded_name(tmp_path):
    case, ids = llama(), tokens(2, TEXT)
    case.base().save_pretrained(tmp_path / "base")
    model = case.architecture.build().from_pretrained(tmp_path / "base")
    ml.attach(model, case.kind.configs["stream"], name="stream")
    ml.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/memory_config.json").read_text())["base"]["name_or_path"].endswith(
        "base"
    )
    assert torch.equal(ml.load(tmp_path / "out")(ids).logits, model.eval()(ids).logits)
    half = ml.load(tmp_path / "out", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(
        ml.memories(half)["stream"].initial_memory, ml.memories(model)["stream"].initial_memory
    )


@torch.no_grad()
def test_a_hub_id_works_where_a_folder_does(tmp_path, monkeypatch):
    case, ids, asked = llama(), tokens(2, TEXT), []
    model = case.model()
    ml.save(model, tmp_path / "cache", save_base=True)

    def snapshot_download(repo, **kwargs):
        asked.append(repo)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = ml.load("someone/llama-with-memory").eval()
    assert asked == ["someone/llama-with-memory"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_is_saved_is_read_by_its_format_alone(tmp_path):
    """The two files are plain JSON and safetensors, so that any tool reads them."""
    model = llama("two_memories").model()
    ml.save(model, tmp_path)
    config = json.loads((tmp_path / "memory_config.json").read_text())
    assert config["memories"]["notes"]["type"] == "tokens"
    assert config["memories"]["notes"]["segment_length"] == 5
    tensors = load_file(tmp_path / "memory.safetensors")
    assert set(tensors) == {name for name, _ in ml.memory_parameters(model)}


def test_saving_twice_replaces_and_leaves_other_files(tmp_path):
    model = llama().model()
    (tmp_path / "notes.txt").write_text("mine")
    for value in (1.0, 2.0):
        with torch.no_grad():
            ml.memories(model)["stream"].initial_memory.fill_(value)
        ml.save(model, tmp_path)
    assert load_file(tmp_path / "memory.safetensors")[
        "memlayers.stream.initial_memory"
    ].unique().tolist() == [2.0]
    assert files_of(tmp_path) == ["README.md", "memory.safetensors", "memory_config.json", "notes.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_piece(tmp_path, monkeypatch):
    model = llama().model()
    ml.save(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_of(tmp_path)}

    def half(path, tensors, metadata):
        with open(path, "wb") as file:
            file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr("memlayers.files.tensors.write_safetensors", half)
    with torch.no_grad():
        ml.memories(model)["stream"].initial_memory.fill_(3.0)
    with pytest.raises(OSError, match="No space left"):
        ml.save(model, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        model(tokens(1, 4)).memory_state.save(tmp_path / "state.safetensors")
    assert {name: (tmp_path / name).read_bytes() for name in files_of(tmp_path)} == before


def test_a_base_that_was_given_is_as_before_when_loading_fails(tmp_path):
    case = llama()
    ml.save(case.model(), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "memory.safetensors")
    base = case.base()
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        ml.load(tmp_path, base=base, verify=False)
    assert ml.memories(base) == {}
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_loaded_memories_train_and_the_base_is_frozen(tmp_path):
    case, ids = llama(), tokens(2, TEXT)
    ml.save(case.model(), tmp_path)
    loaded = ml.load(tmp_path, base=case.base()).train()
    loaded(ids, labels=ids).loss.backward()
    trained = {name for name, p in loaded.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in ml.memory_parameters(loaded)}
