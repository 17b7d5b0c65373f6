"""Files that are missing, cut, foreign or in the way: each error names the file and says what to do."""

import json

import pytest
import torch
from matrix import SEGMENT, TEXT, llama, says, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import memlayers as ml
from memlayers.files import DamagedFile, read_json, write_json


@pytest.fixture
def saved(tmp_path):
    """A whole checkpoint, without its base."""
    ml.save(llama().model(), tmp_path / "out")
    return tmp_path / "out"


def load(folder, base=None, **options):
    return ml.load(folder, base=base or llama().base(), **options)


def rewrite(folder, **changes):
    """Change the config as somebody would who makes its checksum anew."""
    path = folder / "memory_config.json"
    write_json(path, {**read_json(path), **changes})


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
    with pytest.raises(DamagedFile, match=says(str(path), "no checksums", "verify=False")):
        load(saved)
    with pytest.raises(ValueError, match=says(str(path), "tensor", "belongs to another checkpoint")):
        load(saved, verify=False)


def test_a_tensor_too_few_too_many_or_of_another_shape(saved):
    path = saved / "memory.safetensors"
    whole = load_file(path)
    name = "memlayers.stream.initial_memory"
    save_file({n: t for n, t in whole.items() if n != name}, path)
    with pytest.raises(ValueError, match=says(str(path), f"'{name}' is missing")):
        load(saved, verify=False)
    save_file({**whole, "memlayers.stream.more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=says(str(path), "'memlayers.stream.more' does not belong")):
        load(saved, verify=False)
    save_file({**whole, name: torch.zeros(7, 32)}, path)
    with pytest.raises(ValueError, match=says(str(path), name, "(7, 32)", "(2, 32)")):
        load(saved, verify=False)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        save_file({**whole, name: torch.ones_like(whole[name], dtype=dtype)}, path)
        with pytest.raises(ValueError, match=says(str(path), name, str(dtype))):
            load(saved, verify=False)


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
        ("[" * 200_000, ["memory_config.json", "nested too deeply"]),
        ('{"a":' * 200_000, ["memory_config.json", "nested too deeply"]),
        ("[]", ["memory_config.json", "mapping of fields"]),
        ("{}", ["memory_config.json", "format: this field is required"]),
        ("\xff\xfe", ["memory_config.json", "UTF-8"]),
        ('{"format": 2, "base": {}}', ["memory_config.json", "memories: this field is required"]),
        ('{"format": 9, "base": {}, "memories": {}}', ["memory_config.json", "format: 9"]),
        ('{"format": [2], "base": {}, "memories": {}}', ["memory_config.json", "format: [2]"]),
        ('{"format": true, "base": {}, "memories": {}}', ["memory_config.json", "format: expected a number"]),
        ('{"format": 2, "base": {}, "memory": {}}', ["memory_config.json", "'memories'", "memory:"]),
    ],
    ids=[
        *(
            "cut",
            "deep_lists",
            "deep_mappings",
            "no_mapping",
            "empty",
            "not_utf8",
            "no_memories",
            "newer_format",
        ),
        *("format_a_list", "format_true", "misspelt"),
    ],
)
def test_a_config_file_that_is_wrong(saved, text, parts):
    (saved / "memory_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=says(*parts)):
        load(saved, verify=False)
    with pytest.raises(ValueError, match=says("memory_config.json")):
        load(saved)


def test_a_byte_order_mark_before_a_config_is_none_of_its_text(saved):
    path = saved / "memory_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    load(saved)


def test_a_config_that_was_changed_by_hand(saved):
    path = saved / "memory_config.json"
    path.write_text(path.read_text().replace('"segment_length": 5', '"segment_length": 7'))
    with pytest.raises(DamagedFile, match=says(str(path), "checksum", "verify=False")):
        load(saved)
    assert ml.memories(load(saved, verify=False))["stream"].config.segment_length == 7


def test_a_wrong_field_in_a_config_file(saved):
    rewrite(saved, memories={"stream": {"type": "tokens", "n_token": 2}})
    path = f"{saved / 'memory_config.json'}: memories.stream.n_token"
    with pytest.raises(ml.ConfigError, match=says(path, "did you mean 'n_tokens'?")):
        load(saved)
    for wrong in ([], "tokens", {"stream": None}, {"stream": {"type": ["x"]}}, {"a.b": {"type": "tokens"}}):
        rewrite(saved, memories=wrong)
        with pytest.raises(ml.ConfigError, match=says("memory_config.json", "memories")):
            load(saved)
    for wrong in (None, {"name_or_path": ["x"]}):
        rewrite(saved, base=wrong, memories={})
        with pytest.raises(ml.ConfigError, match=says("memory_config.json", "base")):
            load(saved)
    for wrong in ({"../x": "0"}, {"/etc/passwd": "0"}, {"memory.safetensors": 0}, []):
        rewrite(saved, base={}, files=wrong)
        with pytest.raises(ml.ConfigError, match=says("memory_config.json", "files")):
            load(saved)


def test_files_of_another_save_are_told_apart(saved, tmp_path):
    """The memory of one, the config of the other: both are whole."""
    other = llama().model()
    with torch.no_grad():
        ml.memories(other)["stream"].initial_memory.fill_(1.0)
    ml.save(other, tmp_path / "other")
    path = saved / "memory.safetensors"
    path.write_bytes((tmp_path / "other/memory.safetensors").read_bytes())
    with pytest.raises(DamagedFile, match=says(str(path), "another checkpoint or of another save")):
        load(saved)
    assert (ml.memories(load(saved, verify=False))["stream"].initial_memory == 1.0).all()


def test_a_checkpoint_without_checksums(saved):
    """As they were written before there were any."""
    config = read_json(saved / "memory_config.json")
    del config["files"]
    (saved / "memory_config.json").write_text(json.dumps({**config, "format": 1}))
    save_file(load_file(saved / "memory.safetensors"), saved / "memory.safetensors")
    with pytest.raises(ml.ConfigError, match=says("memory_config.json", "format: 1", "verify=False")):
        load(saved)
    loaded = load(saved, verify=False)
    ml.save(loaded, saved)
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


def test_states_whose_metadata_is_wrong(tmp_path):
    path, tensors = tmp_path / "alice.safetensors", {"m.x": torch.ones(2, 3), "m.length": torch.ones(2)}
    good = {"format": "memlayers.state.v1", "fields": '{"m": ["x", "length"]}', "kinds": '{"m": "tokens"}'}
    save_file(tensors, path, metadata=good)
    assert ml.MemoryState.load(path, verify=False).kinds == {"m": "tokens"}
    with pytest.raises(DamagedFile, match=says(str(path), "no checksums", "verify=False")):
        ml.MemoryState.load(path)
    names = ["[]", "null", "5", '{"m": "x"}', '{"m": ["x"]}', '{"m": [["x"], "length"]}', "{", "[" * 200_000]
    kinds = ["[]", '{"m": 1}', '{"other": "tokens"}', '{"m": ["tokens"]}', "{"]
    for wrong in [*({"fields": text} for text in names), *({"kinds": text} for text in kinds)]:
        save_file(tensors, path, metadata={**good, **wrong})
        with pytest.raises(DamagedFile, match=says(str(path), *wrong)):
            ml.MemoryState.load(path, verify=False)
    for part, said in [
        (torch.ones(3, 3), "batch size"),
        (torch.tensor(1.0), "batch-first"),
        (torch.full((2, 3), torch.nan), "'m.x' holds nan or inf"),
    ]:
        save_file({**tensors, "m.x": part}, path, metadata=good)
        with pytest.raises(ValueError, match=says(str(path), said)):
            ml.MemoryState.load(path, verify=False)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    path = tmp_path / "alice.safetensors"
    with pytest.raises(ValueError, match=says(str(path), "'m.x'", "nan or inf")):
        ml.MemoryState({"m": {"x": torch.tensor([[1.0, torch.inf]])}}).save(path)
    assert not path.exists()


def test_a_memory_that_is_not_finite_is_not_saved(saved):
    model, before = load(saved), (saved / "memory.safetensors").read_bytes()
    with torch.no_grad():
        ml.memories(model)["stream"].initial_memory[0, 0] = torch.nan
    path = saved / "memory.safetensors"
    with pytest.raises(ValueError, match=says(f"{path}: tensor", "initial_memory", "nan or inf")):
        ml.save(model, saved)
    assert path.read_bytes() == before


def test_a_base_that_is_a_pickle_or_needs_code_of_its_own(saved, tmp_path):
    """Beside the memory, and elsewhere: neither is read, nobody is asked."""
    folder, model = tmp_path / "whole", llama().model()
    ml.save(model, folder, save_base=True)
    torch.save(model.state_dict(), tmp_path / "pickle")
    elsewhere = tmp_path / "elsewhere"
    for place, name in ((folder, "base"), (saved, str(elsewhere))):
        base = folder / "base" if name == "base" else elsewhere
        rewrite(place, base={**read_json(place / "memory_config.json")["base"], "name_or_path": name})
        if base == elsewhere:
            (folder / "base").rename(elsewhere)
        (base / "model.safetensors").unlink(missing_ok=True)
        (base / "pytorch_model.bin").write_bytes((tmp_path / "pickle").read_bytes())
        with pytest.raises(FileNotFoundError, match=says(str(base))):
            ml.load(place, verify=False)
    config = json.loads((elsewhere / "config.json").read_text())
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (elsewhere / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": code}))
    (elsewhere / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(FileNotFoundError, match=says(str(elsewhere), "code")):
        ml.load(saved)
    assert not (tmp_path / "ran").exists()


def test_a_base_is_taken_from_beside_only_where_it_was_saved(saved, tmp_path, monkeypatch):
    """A folder that lies beside the memory under the name of the base, by chance or by intent, is none."""
    other = llama().base()
    other.save_pretrained(saved / "base")
    other.save_pretrained(saved / "x")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "x", "./x", "out/../nowhere", "../out/nothing"):
        rewrite(saved, base={"name_or_path": name})
        with pytest.raises(FileNotFoundError, match=says(name, "pass base=")):
            ml.load(saved)
