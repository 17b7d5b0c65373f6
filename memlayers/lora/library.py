"""The shards of a bank as they lie on disk: read when they are asked for, checked, and kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch

from ..core.state import Fields
from . import shard as files_of
from .shard import ShardManifest
from .store import BankIndex, Files, Store

KEPT_ADAPTERS = 64
"""Adapters that are kept in memory, those that were read last."""


class Library:
    """Reads shards of the bank in `store`. Folders never change, so that what is kept is known by its folder.

    Attributes:
        targets: layers of the LoRA memory to modules of the model.
        like: fields of one row of that memory.
    """

    def __init__(self, store: Store, targets: dict[str, str], like: Fields):
        self.store, self.targets = store, targets
        self.like = {field: x.detach() for field, x in like.items()}
        self._manifests: dict[str, ShardManifest] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._adapters: OrderedDict[str, Fields] = OrderedDict()

    def manifest(self, index: BankIndex, name: str) -> ShardManifest:
        """Raises as `shard.read_manifest`."""
        entry = index.shards[name]
        if entry.folder not in self._manifests:
            folder = self.store.folder(entry)
            self._manifests[entry.folder] = files_of.read_manifest(folder, name, entry.group, index.base)
        return self._manifests[entry.folder]

    def manifests(self, index: BankIndex) -> dict[str, ShardManifest]:
        """Those of all shards, by name."""
        return {name: self.manifest(index, name) for name in sorted(index.shards)}

    def holding(self, index: BankIndex, documents: Collection[str]) -> list[ShardManifest]:
        """The shards that hold `documents`, by name.

        Raises:
            ValueError: no documents.
            KeyError: a document that is not in the bank.
        """
        if not documents:
            raise ValueError("no documents were given")
        found = [m for m in self.manifests(index).values() if m.documents.keys() & set(documents)]
        for document in sorted(documents):
            if not any(document in manifest.documents for manifest in found):
                raise KeyError(f"no document {document!r} in the bank at {self.store.path}")
        return found

    def texts(self, index: BankIndex, name: str) -> dict[str, str]:
        """The documents of a shard; raises as `shard.read_documents`."""
        return files_of.read_documents(self._folder(index, name), self.manifest(index, name))

    def vectors(self, index: BankIndex, name: str) -> torch.Tensor:
        """The router's vectors (n, d) of a shard; raises as `shard.read_vectors`."""
        key = index.shards[name].folder
        if key not in self._vectors:
            manifest = self.manifest(index, name)
            self._vectors[key] = files_of.read_vectors(self._folder(index, name), manifest)
        return self._vectors[key]

    def adapter(self, index: BankIndex, name: str) -> Fields:
        """The adapter of a shard; raises as `shard.read_adapter`."""
        key = index.shards[name].folder
        if key not in self._adapters:
            manifest = self.manifest(index, name)
            self._adapters[key] = files_of.read_adapter(
                self._folder(index, name), manifest, self.targets, self.like
            )
        self._adapters.move_to_end(key)
        while len(self._adapters) > KEPT_ADAPTERS:
            self._adapters.popitem(last=False)
        return self._adapters[key]

    def peft_files(self, index: BankIndex, name: str) -> Files:
        """The two files of a PEFT adapter, checked against the manifest; raises as `shard.read_adapter`."""
        folder = self._folder(index, name)
        files_of.read_adapter(folder, self.manifest(index, name), self.targets, self.like)
        return {file: (folder / file).read_bytes() for file in (files_of.ADAPTER_CONFIG, files_of.ADAPTER)}

    def drop_old(self, index: BankIndex) -> None:
        """Keep nothing in memory of shards that are no longer in the bank."""
        named = {entry.folder for entry in index.shards.values()}
        for kept in (self._manifests, self._vectors, self._adapters):
            for folder in set(kept) - named:
                del kept[folder]

    def _folder(self, index: BankIndex, name: str) -> Path:
        return self.store.folder(index.shards[name])
