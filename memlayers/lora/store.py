"""The folder of a bank, and changes of it that are whole or not at all.

bank/
  bank.json             the index (`index.py`); replaced in one step
  .lock                 held by the process that writes, empty otherwise
  shards/<name>-<hash>  the files of a shard, which never change

`bank.json` says at every moment which folders are to go, so that nothing else is ever deleted. A change

1. names in `leftovers` the folders that it is about to make, and makes them,
2. replaces `bank.json` by the new one, whose `leftovers` are the old folders: from here on the change is made,
3. deletes those, and names them no more.

Whatever a crash leaves is named in `bank.json`, and the next `open` or change deletes it. What the bank does not know it
leaves as it is, and it follows no link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..files import FolderInUse, holding_file, make_folder, sync_folder, write_whole
from ..files.whole import mode_of, remove_leftovers
from .folders import check_deletable, check_folder, plain_bytes, remove_folder, write_folder
from .index import INDEX, BankIndex, Files, ShardEntry, index_bytes, read_index, write_index

LOCK, SHARDS = ".lock", "shards"
FULL = {errno.ENOSPC, errno.EDQUOT}


class BankLocked(FolderInUse):
    """Another process, or another object of this one, is changing the bank. The message says which and where."""


class Store:
    """The files of one bank.

    Attributes:
        path: of the bank's folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._last: tuple[bytes, BankIndex] | None = None

    @property
    def shards(self) -> Path:
        """Where the folders of the shards lie."""
        return self.path / SHARDS

    def folder(self, entry: ShardEntry) -> Path:
        """Where the files of a shard lie."""
        return self.shards / entry.folder

    def create(self, index: BankIndex) -> None:
        """Make the folder of a bank.

        Raises:
            FileExistsError: a bank or something else is there.
            NotADirectoryError: a file stands at `path` or above it.
            OSError: the disk is full, say; nothing is left over.
        """
        if os.path.lexists(self.path / INDEX):
            raise FileExistsError(f"{self.path} is a bank already; LoRABank.open opens it")
        there = self.path.is_dir()
        make_folder(self.path)
        found = sorted(os.listdir(self.path))
        if found:
            raise FileExistsError(
                f"{self.path} is not empty ({found[0]} is there); name a new folder for the bank"
            )
        try:
            os.mkdir(self.shards)  # of two processes only one makes it
            with self.locked():
                write_index(self.path / INDEX, index)
        except FileExistsError:
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                (self.path / INDEX).unlink(missing_ok=True)
                (self.path / LOCK).unlink(missing_ok=True)
                self.shards.rmdir()
                if not there:
                    self.path.rmdir()
            raise

    def read(self) -> BankIndex:
        """The bank as it is on disk now; raises as `index.read_index`, and DamagedFile where `shards` is a link."""
        found = index_bytes(self.path / INDEX)
        if self._last is not None and self._last[0] == found:  # the same bytes are not looked at twice
            index = self._last[1]
        else:
            index = read_index(self.path / INDEX)
            is_same = index_bytes(self.path / INDEX) == found  # else replaced meanwhile
            self._last = (found, index) if is_same else None
        if os.path.lexists(self.shards):
            check_folder(self.shards)
        return index

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the bank alone while the context lasts; the system lets go when the process dies.

        Raises:
            BankLocked: somebody holds it.
            FileExistsError: a link or no file stands in the place of the lock; it is not touched.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(holding_file(self.path / LOCK))
            except FolderInUse as error:
                raise BankLocked(f"the bank at {self.path} is being changed: {error}") from None
            yield

    def commit(self, index: BankIndex, new: Mapping[str, Files], *, deletes_first: bool = False) -> None:
        """Make `index` the bank, with the folders `new`; all of it or, when anything fails, nothing.

        Call it `locked`, after `finish`. The folders that the index no longer names are deleted.

        Args:
            deletes_first: where a full disk takes no new `bank.json`, and there are no new folders, delete the old
                ones to make room for it.

        Raises:
            FileExistsError: an old folder cannot be deleted wholly, or something else stands in the place of a new
                one. Nothing was changed.
            OSError: the disk is full, say; a note tells whether the bank has changed.
        """
        before = self.read()
        old = sorted(before.folders - index.folders)
        self._check_deletable(old)
        new = {folder: files for folder, files in new.items() if not self._is_there(folder, files)}
        try:
            self._write_new(before, new)
            after = index.with_(leftovers=sorted({*before.leftovers, *old}))
            self._put_index(after, old if deletes_first and not new else [])
            failed = self.finish()
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.finish()
            self._tell(error, before)
            raise
        for folder in old:
            if folder in failed:
                self._tell(failed[folder], before)
                raise failed[folder]

    def mend(self, entry: ShardEntry, files: Files) -> None:
        """Write the files of a shard again that are not as they were written, each whole. Call it `locked`.

        Args:
            files: all of them, as they were written.
        """
        folder = self.folder(entry)
        for name, data in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                write_whole(path, lambda temporary, data=data: temporary.write_bytes(data))

    def finish(self) -> dict[str, OSError]:
        """Delete what `bank.json` says is to go, and say so no more. Call it `locked`.

        Returns:
            The folders that could not be deleted, and why; `bank.json` goes on naming them.
        """
        index, failed = self.read(), {}
        remove_leftovers(self.path / INDEX)
        if not index.leftovers:
            return failed
        for folder in sorted(set(index.leftovers) - index.folders):
            try:
                remove_folder(self.shards / folder)
            except OSError as error:
                failed[folder] = error
        if self.shards.is_dir():
            sync_folder(self.shards)
        if sorted(failed) != sorted(index.leftovers):
            write_index(self.path / INDEX, index.with_(leftovers=sorted(failed)))
        return failed

    def is_unfinished(self, index: BankIndex) -> bool:
        """Whether `finish` has something to do."""
        temporary = f".{INDEX}.memlayers-"
        names = os.listdir(self.path)
        return bool(index.leftovers) or any(n.startswith(temporary) for n in names) or self._is_lock_left()

    def _is_lock_left(self) -> bool:
        """Whether somebody holds the bank, or died while holding it."""
        try:
            found = os.lstat(self.path / LOCK)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_size > 0

    def _check_deletable(self, folders: list[str]) -> None:
        if not folders:
            return
        if os.lstat(self.path / INDEX).st_nlink > 1:
            raise FileExistsError(
                f"{self.path / INDEX} has another name elsewhere, and what it says of the documents would stay there: "
                "delete that one, and try again. Nothing was changed"
            )
        for folder in folders:
            check_deletable(self.shards / folder)

    def _is_there(self, folder: str, files: Files) -> bool:
        """Whether a folder that is to be made is there already, whole; one that a crash left of a bank that was put
        back, say."""
        path = self.shards / folder
        if not os.path.lexists(path):
            return False
        check_folder(path)
        if set(os.listdir(path)) == set(files) and all(plain_bytes(path, n) == d for n, d in files.items()):
            return True
        raise FileExistsError(
            f"{path} stands where a new shard is to be, and is not that one: move it away, and try again. Nothing was "
            "changed"
        )

    def _write_new(self, before: BankIndex, new: Mapping[str, Files]) -> None:
        if not new:
            return
        write_index(self.path / INDEX, before.with_(leftovers=sorted({*before.leftovers, *new})))
        make_folder(self.shards)
        mode = mode_of(self.path / INDEX) or stat.S_IRUSR | stat.S_IWUSR
        for folder, files in new.items():
            write_folder(self.shards / folder, files, mode)

    def _put_index(self, index: BankIndex, deleted_first: list[str]) -> None:
        try:
            write_index(self.path / INDEX, index)
        except OSError as error:
            if error.errno not in FULL or not deleted_first:
                raise
            for folder in deleted_first:
                remove_folder(self.shards / folder)
            try:
                write_index(self.path / INDEX, index)
            except OSError as again:
                again.add_note(f"the files are deleted, and {self.path / INDEX} still names them; try again")
                raise

    def _tell(self, error: BaseException, before: BankIndex) -> None:
        """Note at an error what stands after it."""
        with contextlib.suppress(OSError, ValueError):
            if self.read().shards != before.shards:
                error.add_note(f"the bank at {self.path} has changed; open it again to delete old files")
            elif not getattr(error, "__notes__", []):
                error.add_note(f"the bank at {self.path} is as it was")
