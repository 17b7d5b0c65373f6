"""A bank on other bases and of broken files: each error says what is wrong, and the bank is as it was."""

import pytest
import torch
from matrix import says
from safetensors.torch import load_file, save

import memlayers as ml
from memlayers.files import DamagedFile
from memlayers.lora.shard import base_hash
from tests.lora.bank_cases import QUESTIONS, attached, files, rewrite, rewrite_file, shard_files, some


def test_another_base(makes, unchanged, tokenizer):
    with pytest.raises(ValueError, match="belongs to another base"):
        ml.LoRABank.open(unchanged.path, attached("gpt2"), tokenizer, memory="notes")
    half = attached("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match="belongs to another base"):
        ml.LoRABank.open(unchanged.path, half, tokenizer, memory="notes")


def test_the_hash_of_a_base_is_that_of_what_it_computes(makes, tmp_path):
    before = base_hash(makes.model)
    makes.model.config.use_cache = False
    base = ml.detach(makes.model)
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    loaded.config.pad_token_id = 5
    assert base_hash(base) == base_hash(loaded) == before
    loaded.config.rms_norm_eps = 0.5
    assert base_hash(loaded) != before


def test_another_memory(unchanged, tokenizer):
    for fields, field in (
        ({"r": 3}, "r 2"),
        ({"lora_alpha": 9.0}, "lora_alpha 4.0"),
        ({"layers": [0]}, "targets"),
    ):
        with pytest.raises(ValueError, match=says("was made for a LoRA memory with", field)):
            ml.LoRABank.open(unchanged.path, attached("llama", **fields), tokenizer, memory="notes")
    model = attached("llama")
    with pytest.raises(KeyError, match=says("no memory named 'lora'", "notes")):
        ml.LoRABank.open(unchanged.path, model, tokenizer)
    ml.attach(model, ml.ProductKeyMemoryConfig(layers=[0], n_keys=8, top_k=4), name="facts")
    with pytest.raises(TypeError, match="a bank needs a LoRA memory"):
        ml.LoRABank.create(unchanged.path / "new", model, tokenizer, memory="facts")
    with pytest.raises(ValueError, match="made by the model; pass no encoder"):
        ml.LoRABank.open(unchanged.path, attached("llama"), tokenizer, memory="notes", encoder=len)


def test_weights_that_are_not_those_that_were_written(makes, bank):
    path = shard_files(bank, "rules")["adapter_model.safetensors"]
    whole = path.read_bytes()
    for data in (
        whole[:-1],
        whole[:50],
        b"",
        bytes(len(whole)),
        shard_files(bank, "calls")["adapter_model.safetensors"].read_bytes(),
    ):
        path.write_bytes(data)
        for ask in (
            lambda b: b.read(QUESTIONS, groups=[["red"]] * 2),
            lambda b: b.export("rules", makes.folder / "out"),
        ):
            with pytest.raises(DamagedFile, match=says(str(path), "sha256", "bank.repair()")):
                ask(makes.open())
    assert not (makes.folder / "out").exists()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=says(str(path), "is missing")):
        makes.open().read(QUESTIONS, groups=[["red"]] * 2)


def test_weights_of_another_shape(makes, bank):
    """Of the right sha256: the bank was made for them."""
    path = shard_files(bank, "rules")["adapter_model.safetensors"]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors = load_file(path)
    for changed, expected in (
        ({**tensors, name: torch.zeros(3, 32)}, ["(3, 32)", "(2, 32)"]),
        ({**tensors, "foreign": torch.zeros(1)}, ["'foreign'", "no target"]),
        ({k: v for k, v in tensors.items() if k != name}, [name, "is missing"]),
    ):
        rewrite_file(bank, "rules", path.name, save(changed))
        with pytest.raises(ValueError, match=says(str(path), "does not match the bank", *expected)):
            makes.open().read(QUESTIONS, groups=[["red"]] * 2)
    rewrite_file(bank, "rules", path.name, b"no tensors")
    with pytest.raises(DamagedFile, match=says(str(path), "not a safetensors file")):
        makes.open().read(QUESTIONS, groups=[["red"]] * 2)


def test_other_files_of_a_shard(makes, bank):
    found = shard_files(bank, "rules")
    manifest = found["manifest.json"].read_bytes()
    for data in (manifest.replace(b"red", b"blue"), b"{", b""):
        found["manifest.json"].write_bytes(data)
        with pytest.raises(DamagedFile, match=says(str(found["manifest.json"]), "is damaged")):
            makes.open().list()
        assert [m.name for m in makes.open().list(["blue"])] == ["calls"]
    found["adapter_config.json"].write_bytes(b"{}")
    with pytest.raises(DamagedFile, match=says("adapter_config.json", "is damaged")):
        makes.open().export("rules", makes.folder / "out")
    found = shard_files(bank, "calls")
    found["router.safetensors"].write_bytes(b"")
    with pytest.raises(DamagedFile, match=says("router.safetensors", "sha256")):
        makes.open().route(QUESTIONS, groups=[["blue"]] * 2)
    assert makes.open().route(QUESTIONS, groups=[["red"], []]) == [[("rules", 1.0)], []]


def test_texts_that_are_not_those_that_were_written(makes, bank):
    path = shard_files(bank, "rules")["documents.jsonl"]
    path.write_text(path.read_text().replace("soup", "soap"))
    for change in (
        lambda: bank.update({"handbook": "The key is lost."}),
        lambda: bank.merge(["rules", "more"]),
    ):
        bank.add(some("secret"), "red", "more") if "more" not in {m.name for m in bank.list()} else None
        with pytest.raises(DamagedFile, match=says(str(path), "document 'menu'", "bank.repair()")):
            change()
    (manifest,) = bank.update({"menu": "On Monday we fast."})
    assert list(manifest.documents) == ["handbook", "menu"] and bank.repair(dry_run=True).damaged == {}


def test_an_export_replaces_nothing(makes, bank):
    folder = bank.export("rules", makes.folder / "out")
    before = files(folder)
    assert bank.export("rules", folder) == folder and files(folder) == before
    with pytest.raises(FileExistsError, match=says("is another adapter's", "name another folder")):
        bank.export("calls", folder)
    assert files(folder) == before
    (makes.folder / "links").mkdir()
    (makes.folder / "links" / "adapter_config.json").symlink_to(folder / "adapter_config.json")
    with pytest.raises(FileExistsError, match="is another adapter's"):
        bank.export("rules", makes.folder / "links")
    assert files(folder) == before


def test_folders_that_are_no_bank(makes, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=says("no bank at", str(path), "LoRABank.create")):
            ml.LoRABank.open(path, makes.model, makes.tokenizer, memory="notes")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileNotFoundError, match="no bank at"):
        makes.open("file")
    for name in ("file", "file/below"):
        with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
            makes.new(name)
    with pytest.raises(FileExistsError, match=says("is not empty", "file")):
        makes.new(".")
    makes.new("bank")
    with pytest.raises(FileExistsError, match="is a bank already"):
        makes.new("bank")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"format": "memlayers.bank.v9"}, ["format", "memlayers.bank.v9", "memlayers.bank.v2"]),
        ({"format": "memlayers.bank.v1"}, ["format", "earlier version", "repair=True"]),
        ({"format": None}, ["format", "None"]),
        ({"colour": 1}, ["colour: unknown field"]),
        ({"shards": {"a": {"folder": "../../out", "group": "red"}}}, ["shards", "folder"]),
        ({"leftovers": ["../rules"]}, ["leftovers"]),
        ({"config": {"stepz": 3}}, ["config.stepz: unknown field", "steps"]),
    ],
)
def test_bank_files_of_another_kind(makes, bank, fields, expected):
    rewrite(bank, **fields)
    before = files(bank.path)
    for ask in (makes.open, bank.list, lambda: bank.forget("menu"), bank.repair):
        with pytest.raises(ml.ConfigError, match=says(str(bank.path / "bank.json"), *expected)):
            ask()
    assert files(bank.path) == before


def test_a_bank_file_that_is_not_as_it_was_written(makes, bank):
    before = files(bank.path / "shards")
    whole = (bank.path / "bank.json").read_text()
    for text in ("", "{", "[]", "\xff", "[" * 200_000, whole.replace("rules-", "rulez-"), whole[:-20]):
        (bank.path / "bank.json").write_text(text, encoding="latin-1")
        for ask in (makes.open, bank.list, lambda: bank.forget("menu")):
            with pytest.raises(DamagedFile, match=says(str(bank.path / "bank.json"), "repair=True")):
                ask()
    assert files(bank.path / "shards") == before, "what cannot be read is not cleaned"
