"""A bank on other bases and of broken files: each error says what is wrong, and the bank is as it was."""

import pytest
import torch
from matrix import says
from safetensors.torch import load_file, save_file

import memlayers as ml
from memlayers.lora.shard import base_hash, sha256
from tests.lora.bank_cases import QUESTIONS, attached, files, rewrite, shard_files


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


def test_an_adapter_of_another_base(makes, bank):
    rewrite(shard_files(bank, "rules")["manifest.json"], base="0" * 64)
    for ask in (
        lambda b: b.read(QUESTIONS, groups=[["red"]] * 2),
        lambda b: b.export("rules", makes.folder / "out"),
        lambda b: b.update({"menu": "Nothing to eat."}),
    ):
        with pytest.raises(ValueError, match=says("manifest.json", "trained on another base")):
            ask(makes.open())


def test_weights_that_are_not_those_of_the_manifest(makes, bank):
    path = shard_files(bank, "rules")["adapter_model.safetensors"]
    whole = path.read_bytes()
    for data in (
        whole[:-1],
        whole[:50],
        b"",
        shard_files(bank, "calls")["adapter_model.safetensors"].read_bytes(),
    ):
        path.write_bytes(data)
        for ask in (
            lambda b: b.read(QUESTIONS, groups=[["red"]] * 2),
            lambda b: b.export("rules", makes.folder / "out"),
        ):
            with pytest.raises(ValueError, match=says(str(path), "sha256", "do not belong to this manifest")):
                ask(makes.open())
    assert not (makes.folder / "out").exists()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=says(str(path), "is missing")):
        makes.open().read(QUESTIONS, groups=[["red"]] * 2)


def test_weights_of_another_shape(makes, bank):
    """Of the right sha256: the manifest was made for them."""
    found = shard_files(bank, "rules")
    path, name = (
        found["adapter_model.safetensors"],
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
    )
    tensors = load_file(path)
    for changed, expected in (
        ({**tensors, name: torch.zeros(3, 32)}, ["(3, 32)", "rank 2", "(2, 32)"]),
        ({**tensors, "foreign": torch.zeros(1)}, ["'foreign'", "no target"]),
        ({k: v for k, v in tensors.items() if k != name}, [name, "is missing"]),
    ):
        save_file(changed, path)
        rewrite(found["manifest.json"], adapter=sha256(path.read_bytes()))
        with pytest.raises(ValueError, match=says(str(path), "does not match its manifest", *expected)):
            makes.open().read(QUESTIONS, groups=[["red"]] * 2)


def test_other_files_of_a_shard(makes, bank):
    found = shard_files(bank, "rules")
    manifest = found["manifest.json"].read_bytes()
    rewrite(found["manifest.json"], group="blue")
    with pytest.raises(ValueError, match=says("group: 'blue' is not 'red'")):
        makes.open().list()
    rewrite(found["manifest.json"], group="red", color=3)
    with pytest.raises(ml.ConfigError, match=says(str(found["manifest.json"]), "color: unknown field")):
        makes.open().list()
    found["manifest.json"].write_text("{")
    with pytest.raises(ml.ConfigError, match=r"manifest\.json"):
        makes.open().list()
    found["manifest.json"].write_bytes(manifest)
    found = shard_files(bank, "calls")
    found["router.safetensors"].write_bytes(b"")
    with pytest.raises(ValueError, match=says("router.safetensors", "sha256")):
        makes.open().route(QUESTIONS, groups=[["blue"]] * 2)
    texts = found["documents.jsonl"]
    texts.write_text(texts.read_text().replace("queen", "king"))
    with pytest.raises(ValueError, match=says("documents.jsonl", "'visit' is not as manifest.json has it")):
        makes.open().update({"visit": "The queen stays away."})
    texts.write_text("{")
    with pytest.raises(ValueError, match="cut short or not a file of documents"):
        makes.open().forget("visit")


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
        ({"format": "memlayers.bank.v2"}, ["format", "memlayers.bank.v2", "memlayers.bank.v1"]),
        ({"format": None}, ["format", "None"]),
        ({"colour": 1}, ["colour: unknown field"]),
        ({"shards": {"a": {"folder": "../../out", "group": "red"}}}, ["shards", "folder"]),
        ({"config": {"stepz": 3}}, ["config.stepz: unknown field", "steps"]),
    ],
)
def test_bank_files_of_another_kind(makes, bank, fields, expected):
    rewrite(bank.path / "bank.json", **fields)
    for ask in (makes.open, bank.list, lambda: bank.forget("menu")):
        with pytest.raises(ml.ConfigError, match=says(str(bank.path / "bank.json"), *expected)):
            ask()


def test_a_bank_file_that_is_no_json(makes, bank):
    before = files(bank.path / "shards")
    for text in ("", "{", "[]", "\xff"):
        (bank.path / "bank.json").write_text(text, encoding="latin-1")
        with pytest.raises(ml.ConfigError, match=says(str(bank.path / "bank.json"))):
            makes.open()
    assert files(bank.path / "shards") == before, "what cannot be read is not cleaned"
