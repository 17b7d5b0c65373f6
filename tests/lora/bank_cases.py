"""What the tests of the bank share: models, texts, and folders as bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from matrix import ARCHITECTURES, CHECKPOINT

import memlayers as ml
from memlayers.files import read_json, write_json
from memlayers.lora.index import sha256
from memlayers.lora.reader import lora_memory

CONFIG = ml.LoRABankConfig(
    steps=3, learning_rate=0.05, batch_size=2, segment_length=12, router_length=8, temperature=0.1
)
NOON = "2026-01-01T12:00:00+00:00"
TEXTS = {
    "handbook": "The key to the shed is under the third pot. The shed is shut at night.",
    "menu": "On Monday we eat soup, and on Tuesday we eat fish with rice.",
    "secret": "Zanzibar-7731 opens the vault, and nobody else may ever know.",
    "visit": "The queen comes to town on the first of May.",
}
QUESTIONS = ["Where is the key to the shed?", "What do we eat on Monday?"]


def attached(architecture: str, **fields):
    """A tiny model of the matrix, or the real one, with a LoRA memory `notes`."""
    model = next(a for a in ARCHITECTURES if a.name == architecture).build().eval()
    ml.attach(model, ml.LoRAMemoryConfig(**{"r": 2, "lora_alpha": 4.0, **fields}), name="notes")
    return model


def tokenizer_of(architecture: str, tiny):
    """The real checkpoint's own tokenizer, the `tiny` one for the others."""
    if architecture != "stories260K":
        return tiny
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


class Makes:
    """Makes and opens banks of one model, with a clock that stands still."""

    def __init__(self, model, tokenizer, folder: Path):
        self.model, self.tokenizer, self.folder = model, tokenizer, folder

    def new(self, name: str = "bank", config: ml.LoRABankConfig = CONFIG, **options) -> ml.LoRABank:
        options = {"memory": "notes", "config": config, "clock": lambda: NOON, **options}
        return ml.LoRABank.create(self.folder / name, self.model, self.tokenizer, **options)

    def open(self, name: str = "bank", **options) -> ml.LoRABank:
        options = {"memory": "notes", "clock": lambda: NOON, **options}
        return ml.LoRABank.open(self.folder / name, self.model, self.tokenizer, **options)


def some(*documents: str) -> dict[str, str]:
    """Some of the texts by id."""
    return {document: TEXTS[document] for document in documents}


def files(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder, by path, and its folders as None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def shard_files(bank: ml.LoRABank, name: str) -> dict[str, Path]:
    """The files of a shard by name."""
    (folder,) = (bank.path / "shards").glob(f"{name}-{'[0-9a-f]' * 16}")
    return {path.name: path for path in folder.iterdir()}


def rewrite(bank: ml.LoRABank, **fields) -> None:
    """Change fields of `bank.json`, which has the right checksum afterwards."""
    write_json(bank.path / "bank.json", {**read_json(bank.path / "bank.json"), **fields})


def rewrite_file(bank: ml.LoRABank, shard: str, name: str, data: bytes) -> None:
    """Change a file of a shard, as one that `bank.json` knows; the name of the folder stays."""
    shard_files(bank, shard)[name].write_bytes(data)
    shards = read_json(bank.path / "bank.json")["shards"]
    shards[shard]["files"][name] = sha256(data)
    rewrite(bank, shards=shards)


def traces(text: str, *others: str | bytes) -> list[bytes]:
    """What may not be found after a text was forgotten: its words, its hash, and what else is said."""
    words = [word for word in text.split() if len(word) > 5]
    return [x.encode() if isinstance(x, str) else x for x in (*words, sha256(text), *others)]


def found_in(folder: Path, wanted: list[bytes]) -> list[bytes]:
    """Which of `wanted` are in a file or a name under a folder."""
    present = files(folder)
    data = [*present.values(), *(name.encode() for name in present)]
    return [x for x in wanted if any(x in each for each in data if each)]


def flipped(data: bytes, bit: int) -> bytes:
    """The same with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def learned(model, memory, tokenizer, documents, name, config, **options):
    """An adapter without training, another one for other texts."""
    generator = torch.Generator().manual_seed(int(sha256(repr((name, sorted(documents.items()))))[:8], 16))
    like = lora_memory(model, memory).new_state(1)
    return {field: torch.randn(x.shape[1:], generator=generator) for field, x in like.items()}
