"""How a bank changes: new shards are made in memory, then put in the place of old ones in one step."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator, Sequence

from . import recipes
from .folders import check_deletable, held
from .index import INDEX, BankIndex, Files, folder_of
from .making import make_shard
from .reader import BankReader
from .recipes import Recipe
from .repair import whole_files
from .shard import ShardManifest, entry_of, manifest_of
from .store import BankLocked

Made = tuple[ShardManifest, Files]
"""A new shard: its manifest and all its files."""


class BankWriter(BankReader):
    """What the changes of `LoRABank` have in common; see there."""

    @contextlib.contextmanager
    def _changing(self) -> Iterator[BankIndex]:
        """The bank as it is on disk, held by this object alone, and clean."""
        self._store.read()
        with self._store.locked():
            self._store.finish()
            yield self._store.read()

    def _finish(self) -> None:
        """Delete what a crash left, and warn where that cannot be done."""
        try:
            with self._store.locked():
                failed = list(self._store.finish().values())
        except BankLocked:  # who changes it now finishes it
            return
        except OSError as error:
            failed = [error]
        for error in failed:
            warnings.warn(
                f"the bank at {self.path} has old files that are to be deleted and cannot be: {error}",
                stacklevel=3,
            )

    def _replace(
        self, index: BankIndex, old: Sequence[ShardManifest], new: Sequence[Recipe], progress: bool
    ) -> Sequence[ShardManifest]:
        """Make the shards `new` and put them in the place of the `old` ones; their manifests."""
        return self._put(index, old, [self._make(index, recipe, progress) for recipe in new])

    def _make(self, index: BankIndex, recipe: Recipe, progress: bool, kept: Files | None = None) -> Made:
        return make_shard(
            self.model,
            self.memory,
            self.tokenizer,
            recipe,
            self._router,
            index.base,
            self.config,
            kept=kept,
            progress=progress,
        )

    def _put(
        self,
        index: BankIndex,
        old: Sequence[ShardManifest],
        made: Sequence[Made],
        *,
        deletes_first: bool = False,
    ) -> Sequence[ShardManifest]:
        """Put shards in the place of the `old` ones, on disk; their manifests."""
        gone = {manifest.name for manifest in old}
        shards = {name: entry for name, entry in index.shards.items() if name not in gone}
        for manifest, _ in made:
            check_free(manifest.name, shards)
        shards |= {manifest.name: entry_of(manifest, files) for manifest, files in made}
        folders = {shards[manifest.name].folder: files for manifest, files in made}
        after = index.with_(shards=shards)
        self._library.drop_old(after)
        self._store.commit(after, folders, deletes_first=deletes_first)
        return [manifest for manifest, _ in made]

    def _without(
        self, index: BankIndex, old: Sequence[ShardManifest], gone: Collection[str]
    ) -> tuple[list[Recipe], list[str]]:
        """The shards that are left of `old` ones without documents, and other documents that are lost."""
        left, lost = [], []
        for manifest in old:
            others = manifest.documents.keys() - gone
            texts = self._library.whole_texts(index, manifest.name) if others else {}
            recipe = recipes.without(manifest, texts, gone)
            left += [] if recipe is None else [recipe]
            lost += sorted(others - texts.keys())
        return left, lost

    def _check_no_copies(self, index: BankIndex, old: Sequence[ShardManifest], gone: Collection[str]) -> None:
        """Raise FileExistsError where a document of `old` shards lies in another folder too: of a shard that is damaged,
        because a file was copied over it, or of none, as after an older `bank.json` was put back."""
        own, shards = {index.shards[manifest.name].folder for manifest in old}, self._store.shards
        for folder in sorted(set(os.listdir(shards) if shards.is_dir() else []) - own):
            for document in held(shards / folder, gone):
                told = (
                    "bank.repair() may mend that shard, or forget its documents too"
                    if folder in index.folders
                    else "delete that folder, and try again"
                )
                raise FileExistsError(
                    f"{shards / folder} holds document {document!r} too, though {INDEX} does not say so, and would go on "
                    f"holding it: {told}. Nothing was changed"
                )

    def _mend(self, index: BankIndex, name: str, progress: bool) -> bool:
        """Make the files of a damaged shard again that are not whole; whether that could be done."""
        entry, manifest = index.shards[name], manifest_of(index, name)
        folder, texts = self._store.folder(entry), self._library.whole_texts(index, name)
        try:
            check_deletable(folder)
        except FileExistsError:  # links and files of others stay as they are
            return False
        if texts.keys() != manifest.documents.keys():
            return False
        made = self._make(index, recipes.again(manifest, texts), progress, whole_files(folder, entry))
        if folder_of(name, made[1]) == entry.folder:
            self._store.mend(entry, made[1])
        else:  # trained on another machine, say: not the same bits
            self._put(index, [manifest], [made])
        return True


def check_free(name: str, taken: Collection[str]) -> None:
    """Raise ValueError where the name of a new shard is taken."""
    if name in taken:
        raise ValueError(f"the bank has a shard {name!r} already; choose another name")
