"""What is damaged in a bank, and a `bank.json` made again from the shards that are whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from ..files import DamagedFile
from . import shard as files_of
from .bank_config import LoRABankConfig
from .folders import check_folder, plain_bytes, read_file
from .ids import check_id
from .index import (
    EARLIER,
    FOLDER,
    INDEX,
    MANIFEST,
    SHARD_FILES,
    BankIndex,
    Files,
    ShardEntry,
    folder_of,
    unproven,
    write_index,
)
from .router import Router
from .shard import ShardManifest, entry_of, parse_manifest
from .store import LOCK, SHARDS, Store


@dataclass(frozen=True)
class BankReport:
    """What stands in the folder of a bank; folders and files are named by their paths in it.

    Attributes:
        whole: shards of which every file is as it was written, by name.
        mended: shards that `repair` has made whole, and what was wrong with them.
        damaged: shards that are not whole, and what is wrong with them.
        lost: of damaged shards, the documents whose text is not as it was written. Only you have it: `update` takes it
            again; or `forget` the document.
        orphans: folders that are whole shards of this bank, and that `bank.json` does not name, as after an older
            `bank.json` was put back. To take them up, move `bank.json` away and open the bank with `repair=True`.
        leftovers: folders that are to go, and why they could not be deleted.
        unknown: everything else. It is left as it is.
    """

    whole: list[str]
    damaged: dict[str, list[str]] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    leftovers: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    mended: dict[str, list[str]] = field(default_factory=dict)


def examine(store: Store, index: BankIndex) -> BankReport:
    """Read every file of a bank."""
    damaged = {name: damage_of(store.folder(entry), entry) for name, entry in sorted(index.shards.items())}
    damaged = {name: told for name, told in damaged.items() if told}
    lost = {
        name: sorted(entry.documents.keys() - files_of.whole_documents(store.folder(entry), entry).keys())
        for name, entry in index.shards.items()
        if name in damaged
    }
    named = index.folders | set(index.leftovers)
    others = [name for name in _names(store.shards) if name not in named]
    ours = {"base": index.base, "r": index.r, "lora_alpha": index.lora_alpha, "targets": index.targets}
    orphans = [name for name, manifest, _ in whole_shards(store.shards, others) if _fits(manifest, ours)]
    return BankReport(
        whole=[name for name in sorted(index.shards) if name not in damaged],
        damaged=damaged,
        lost={name: documents for name, documents in sorted(lost.items()) if documents},
        orphans=[f"{SHARDS}/{name}" for name in orphans],
        leftovers={f"{SHARDS}/{name}": "to be deleted by the next change" for name in index.leftovers},
        unknown=[name for name in _names(store.path) if name not in (INDEX, LOCK, SHARDS)]
        + [f"{SHARDS}/{name}" for name in others if name not in orphans]
        + [
            f"{SHARDS}/{entry.folder}/{name}"
            for entry in index.shards.values()
            for name in _strange(store, entry)
        ],
    )


def damage_of(folder: Path, entry: ShardEntry) -> list[str]:
    """What is wrong with the files of a shard, a line a file; nothing where it is whole."""
    try:
        check_folder(folder)
    except (OSError, DamagedFile) as error:
        return [str(error)]
    found = []
    for name in sorted(SHARD_FILES):
        try:
            read_file(folder, name, entry.files[name])
        except (OSError, DamagedFile) as error:
            found.append(str(error))
    return found


def whole_files(folder: Path, entry: ShardEntry) -> Files:
    """The files of a shard that are as they were written."""
    found = {}
    for name in sorted(SHARD_FILES):
        try:
            found[name] = read_file(folder, name, entry.files[name])
        except (OSError, DamagedFile):
            continue
    return found


def whole_shards(shards: Path, names: list[str]) -> Iterator[tuple[str, ShardManifest, Files]]:
    """Folders that are whole shards by the hash in their names, with manifests and files."""
    for name in names:
        if not FOLDER.fullmatch(name):
            continue
        try:
            files = {file: plain_bytes(shards / name, file) for file in sorted(SHARD_FILES)}
        except (OSError, DamagedFile):
            continue
        manifest = parse_manifest(files[MANIFEST])
        if manifest is not None and folder_of(manifest.name, files) == name:
            yield name, manifest, files


def rebuild(store: Store, model, tokenizer, encoder, shape: dict[str, Any]) -> None:
    """Make `bank.json` again from the shards that are whole, where it is damaged, missing, or of an earlier version.

    A warning names what was taken up, and which folders were not. Nothing is deleted but the old `bank.json`.

    Args:
        shape: as `reader.shape_of` gives it.

    Raises:
        FileNotFoundError: no bank there.
        ConfigError: `bank.json` is of a format of which this version knows nothing.
        DamagedFile: no shard is whole; or two of them hold the same document, as when a change was interrupted.
        ValueError: `encoder` is not the one that the shards were made with.
    """
    path = store.path / INDEX
    try:
        store.read()
        return
    except ConfigError:
        if unproven(path).get("format") != EARLIER:
            raise
    except FileNotFoundError:
        if not store.shards.is_dir():
            raise
    except DamagedFile:
        pass
    check_folder(store.shards)
    with store.locked():
        index = _rebuilt(store, {"base": files_of.base_hash(model), **shape}, encoder)
        _check_encoder(store, index, Router(model, tokenizer, index.config, encoder))
        write_index(path, index)
    left = [name for name in _names(store.shards) if name not in index.folders]
    warnings.warn(
        f"{path} was made again, of the shards {sorted(index.shards)}"
        + (f"; these are not whole, or not of this bank, or were to go, and stay: {left}" if left else "")
        + ". Look whether a document that you have forgotten is among them; bank.repair() tells more",
        stacklevel=3,
    )


def _rebuilt(store: Store, ours: dict[str, Any], encoder) -> BankIndex:
    before, names = unproven(store.path / INDEX), _names(store.shards)
    if before.get("format") == EARLIER:  # it says which folders are the bank's
        entries = before.get("shards")
        named = [entry.get("folder") for entry in entries.values()] if isinstance(entries, dict) else []
        names, leftovers = [name for name in names if name in named], []
    else:
        going = before.get("leftovers") if isinstance(before.get("leftovers"), list) else []
        leftovers = [name for name in names if name in going and FOLDER.fullmatch(name)]
        names = [name for name in names if name not in going]
    found = [(name, m, files) for name, m, files in whole_shards(store.shards, names) if _fits(m, ours)]
    if not found and before.get("format") != EARLIER:
        raise DamagedFile(f"{store.path}: no shard of this base is whole, and {INDEX} cannot be made of them")
    configs = [manifest.training for _, manifest, _ in found]
    config = configs[0] if configs else LoRABankConfig(**before.get("config", {}))
    shards: dict[str, ShardEntry] = {}
    holders: dict[str, str] = {}
    for folder, manifest, files in found:
        if manifest.training != config:
            raise DamagedFile(f"{store.shards}: {found[0][0]} and {folder} are of two banks: move one away")
        for document in manifest.documents:
            if check_id(document, "the document id") != document:
                raise ValueError(
                    f"{store.shards / folder}: the document id {document!r} is not in Unicode's NFC"
                )
        for taken in (f"the name {manifest.name!r}", *(f"document {d!r}" for d in manifest.documents)):
            if taken in holders:
                raise DamagedFile(
                    f"{store.shards}: {holders[taken]} and {folder} both hold {taken}, as after a change that was "
                    "interrupted: move the older one away, and try again"
                )
            holders[taken] = folder
        shards[manifest.name] = entry_of(manifest, files)
    router = "model" if encoder is None else "user"
    return BankIndex(router=router, config=config, shards=shards, leftovers=leftovers, **ours)


def _check_encoder(store: Store, index: BankIndex, router: Router) -> None:
    """Raise ValueError unless `router` makes the vectors that a shard has."""
    for entry in list(index.shards.values())[:1]:
        texts = files_of.whole_documents(store.folder(entry), entry)
        has = files_of.read_vectors(store.folder(entry), entry)
        made = torch.cat([router.document(texts[document]) for document in sorted(texts)])
        if has.shape != made.shape or not torch.allclose(has, made, atol=1e-2):
            raise ValueError(
                f"the router's vectors in {store.folder(entry)} were made by another encoder than the one given; pass "
                "the one that the bank was made with as encoder=, or none"
            )


def _fits(manifest: ShardManifest, ours: dict[str, Any]) -> bool:
    return all(getattr(manifest, name) == value for name, value in ours.items())


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _strange(store: Store, entry: ShardEntry) -> list[str]:
    folder = store.folder(entry)
    return [] if folder.is_symlink() else [name for name in _names(folder) if name not in SHARD_FILES]
