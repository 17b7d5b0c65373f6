"""`bank.json`: what a bank is, and of each shard where it lies, who may read it, its documents and the SHA-256 of its files.

It has a checksum. All that a change needs to know of the other shards is in it, so that a shard that is damaged stops
nothing but its own readers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, field_validator

from ..config import ConfigError, Strict, explain
from ..files import DamagedFile, read_json, write_json
from .bank_config import LoRABankConfig

INDEX, FORMAT, EARLIER = "bank.json", "memlayers.bank.v2", "memlayers.bank.v1"
MANIFEST, ADAPTER, ADAPTER_CONFIG = "manifest.json", "adapter_model.safetensors", "adapter_config.json"
DOCUMENTS, ROUTER = "documents.jsonl", "router.safetensors"
SHARD_FILES = frozenset({MANIFEST, ADAPTER, ADAPTER_CONFIG, DOCUMENTS, ROUTER})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
FOLDER = re.compile(rf"{NAME.pattern}-[0-9a-f]{{16}}")
FolderName = Field(pattern=rf"^{FOLDER.pattern}$")
Files = dict[str, bytes]
"""The files of a shard by name."""


class ShardFacts(Strict):
    """What `bank.json` and the manifest of a shard both say.

    Attributes:
        group: of the shard; who may read the group may read the shard.
        documents: id to the sha256 of its text.
        created: when the shard was added or merged, ISO 8601.
        version: 1, and one more with each update.
        updated: id of each document that has been updated to the versions in which that happened.
        parent: sha256 of the adapter before the last update. None for a new shard, and after a document was forgotten.
    """

    group: str
    documents: dict[str, str] = Field(min_length=1)
    created: str
    version: int = Field(1, ge=1)
    updated: dict[str, list[int]] = Field(default_factory=dict)
    parent: str | None = None


class ShardEntry(ShardFacts):
    """A shard in `bank.json`.

    Attributes:
        folder: its folder under `shards/`: the shard's name and a hash of all its files.
        files: the sha256 of each of its files.
    """

    folder: str = FolderName
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _all_files(cls, files: dict[str, str]) -> dict[str, str]:
        if files.keys() != SHARD_FILES:
            raise ValueError(f"a shard has the files {sorted(SHARD_FILES)}")
        return files


class BankIndex(Strict):
    """What `bank.json` holds.

    Attributes:
        format: of the bank's files.
        base: hash of the base that all shards were trained on (`shard.base_hash`).
        r, lora_alpha, targets: of the LoRA memory that all shards fit; targets are names of modules in the model.
        router: who makes the router's vectors: the `model` itself or a `user`'s encoder.
        config: of the bank.
        shards: by name.
        leftovers: folders under `shards/` that are to go: old ones, or new ones that are not finished.
    """

    format: Literal["memlayers.bank.v2"] = FORMAT
    base: str
    r: int
    lora_alpha: float
    targets: list[str]
    router: Literal["model", "user"]
    config: LoRABankConfig
    shards: dict[str, ShardEntry]
    leftovers: list[pydantic.constr(pattern=rf"^{FOLDER.pattern}$")] = Field(default_factory=list)

    def with_(self, **fields: Any) -> BankIndex:
        """A copy with other `fields`."""
        return self.model_copy(update=fields)

    @property
    def folders(self) -> set[str]:
        """The folders of all shards."""
        return {entry.folder for entry in self.shards.values()}


def write_index(path: Path, index: BankIndex) -> None:
    """Write `bank.json`, the same bytes for the same bank; raises as `write_whole`."""
    fields = index.model_dump()
    fields["shards"] = {name: index.shards[name].model_dump() for name in sorted(index.shards)}
    fields["leftovers"] = sorted(index.leftovers)
    write_json(path, fields)


def read_index(path: Path) -> BankIndex:
    """What `bank.json` holds.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: not as it was written, or no file.
        ConfigError: of another format, or a field is wrong.
    """
    index_bytes(path)
    told = "LoRABank.open(..., repair=True) makes it again from the shards that are whole"
    try:
        data = read_json(path)
    except DamagedFile as error:
        if unproven(path).get("format") != EARLIER:
            raise DamagedFile(
                f"{path} is not as it was written: put back a copy that is whole, or {told}"
            ) from error
        data = {"format": EARLIER}
    if data.get("format") == EARLIER:
        raise ConfigError(f"{path}: format: {EARLIER!r} is of an earlier version of memlayers; {told}")
    if data.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: format: {data.get('format')!r} is not {FORMAT!r}, the one this version reads"
        )
    try:
        return BankIndex.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, BankIndex, where=str(path))) from None


def index_bytes(path: Path) -> bytes:
    """The bytes of `bank.json`, right or wrong.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is a link or no file.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DamagedFile(
                f"{path} is a link or no file; a bank follows no links: put the file in its place"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"no bank at {path.parent}: {INDEX} is missing; LoRABank.create makes one"
        ) from None


def unproven(path: Path) -> dict[str, Any]:
    """The fields of a `bank.json` whose checksum is wrong or missing; none where it cannot be read at all."""
    try:
        return read_json(path, verify=False)
    except (DamagedFile, OSError):
        return {}


def folder_of(name: str, files: Mapping[str, bytes]) -> str:
    """The name of the folder of a shard: that of the shard and a hash of all its files."""
    parts = [(file, sha256(data)) for file, data in sorted(files.items())]
    return f"{name}-{sha256(json.dumps(parts))[:16]}"


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can be that of a shard, part of the name of a folder."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise ValueError(
            f"{name!r} cannot name a shard: use up to 64 letters, digits, '_', '-' and single '.', the first a letter "
            "or digit"
        )


def sha256(data: str | bytes) -> str:
    """Hex digest of bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
