"""The shards of a bank as they lie on disk: read when they are asked for, proven, and kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch

from ..core.state import Fields
from ..files import DamagedFile
from . import shard as files_of
from .folders import TOLD, read_file
from .index import ADAPTER, ADAPTER_CONFIG, DOCUMENTS, MANIFEST, BankIndex, Files
from .shard import ShardManifest, manifest_of
from .store import Store

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
        self._vectors: dict[str, torch.Tensor] = {}
        self._adapters: OrderedDict[str, Fields] = OrderedDict()

    def manifest(self, index: BankIndex, name: str) -> ShardManifest:
        """The manifest of a shard, its file proven; raises as `folders.read_file`."""
        self._read(index, name, MANIFEST)
        return manifest_of(index, name)

    def holding(self, index: BankIndex, documents: Collection[str]) -> list[ShardManifest]:
        """The shards that hold `documents`, by name. No file of a shard is read.

        Raises:
            ValueError: no documents.
            KeyError: a document that is not in the bank.
        """
        if not documents:
            raise ValueError("no documents were given")
        wanted = set(documents)
        found = [name for name in sorted(index.shards) if index.shards[name].documents.keys() & wanted]
        held = {document for name in found for document in index.shards[name].documents}
        for document in sorted(wanted - held):
            raise KeyError(f"no document {document!r} in the bank at {self.store.path}")
        return [manifest_of(index, name) for name in found]

    def texts(self, index: BankIndex, name: str, but: Collection[str] = ()) -> dict[str, str]:
        """The documents of a shard.

        Args:
            but: documents that need not be whole.

        Raises:
            DamagedFile: the text of another document is not as it was written.
        """
        entry = index.shards[name]
        whole = self.whole_texts(index, name)
        for document in sorted(entry.documents.keys() - whole.keys() - set(but)):
            raise DamagedFile(
                f"{self._folder(index, name) / DOCUMENTS}: document {document!r} is missing or not as it was "
                f"written; {TOLD}; update or forget it"
            )
        return whole

    def whole_texts(self, index: BankIndex, name: str) -> dict[str, str]:
        """The documents of a shard that are as they were written."""
        return files_of.whole_documents(self._folder(index, name), index.shards[name])

    def vectors(self, index: BankIndex, name: str) -> torch.Tensor:
        """The router's vectors (n, d) of a shard; raises as `shard.read_vectors`."""
        key = index.shards[name].folder
        if key not in self._vectors:
            self._vectors[key] = files_of.read_vectors(self._folder(index, name), index.shards[name])
        return self._vectors[key]

    def adapter(self, index: BankIndex, name: str) -> Fields:
        """The adapter of a shard; raises as `shard.read_adapter`."""
        key = index.shards[name].folder
        if key not in self._adapters:
            self._adapters[key] = self._read_adapter(index, name)
        self._adapters.move_to_end(key)
        while len(self._adapters) > KEPT_ADAPTERS:
            self._adapters.popitem(last=False)
        return self._adapters[key]

    def peft_files(self, index: BankIndex, name: str) -> Files:
        """The two files of a PEFT adapter, proven; raises as `shard.read_adapter`."""
        self._read_adapter(index, name)
        return {file: self._read(index, name, file) for file in (ADAPTER_CONFIG, ADAPTER)}

    def drop_old(self, index: BankIndex) -> None:
        """Keep nothing in memory of shards that are no longer in the bank."""
        for kept in (self._vectors, self._adapters):
            for folder in set(kept) - index.folders:
                del kept[folder]

    def _read_adapter(self, index: BankIndex, name: str) -> Fields:
        return files_of.read_adapter(self._folder(index, name), index.shards[name], self.targets, self.like)

    def _read(self, index: BankIndex, name: str, file: str) -> bytes:
        return read_file(self._folder(index, name), file, index.shards[name].files[file])

    def _folder(self, index: BankIndex, name: str) -> Path:
        return self.store.folder(index.shards[name])
