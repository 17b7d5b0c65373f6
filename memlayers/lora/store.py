"""The folder of a bank: `bank.json` names the shards' folders, which never change once they are there.

bank/
  bank.json             format, base, config, and the folder and group of each shard; replaced in one step
  .lock                 held by the process that writes, empty otherwise
  shards/<name>-<hash>  the files of a shard

A change writes new folders under temporary names, renames them, replaces `bank.json`, and then deletes the folders that
it no longer names. Whatever a crash leaves over is not in `bank.json`, and the next `open` or change deletes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import filelock
import pydantic
from pydantic import Field

from ..config import ConfigError, Strict, explain
from ..files import write_text
from .bank_config import LoRABankConfig

INDEX, LOCK, SHARDS, FORMAT = "bank.json", ".lock", "shards", "memlayers.bank.v1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
Files = dict[str, bytes]
"""The files of a shard by name."""


class BankLocked(RuntimeError):
    """Another process, or another object of this one, is changing the bank. The message says which and where."""


class ShardEntry(Strict):
    """Where a shard lies and who may read it: all that is looked at before access is granted.

    Attributes:
        folder: its folder under `shards/`.
        group: whoever may read this group may read the shard.
    """

    folder: str = Field(pattern=rf"^{NAME.pattern}-[0-9a-f]{{16}}$")
    group: str


class BankIndex(Strict):
    """What `bank.json` holds.

    Attributes:
        format: of the bank's files.
        base: hash of the base that all shards were trained on (`shard.base_hash`).
        r, lora_alpha, targets: of the LoRA memory that all shards fit; targets are names of modules in the model.
        router: who makes the router's vectors: the `model` itself or a `user`'s encoder.
        config: of the bank.
        shards: by name.
    """

    format: Literal["memlayers.bank.v1"]
    base: str
    r: int
    lora_alpha: float
    targets: list[str]
    router: Literal["model", "user"]
    config: LoRABankConfig
    shards: dict[str, ShardEntry]


class Store:
    """The files of one bank.

    Attributes:
        path: of the bank's folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def folder(self, entry: ShardEntry) -> Path:
        """Where the files of a shard lie."""
        return self.path / SHARDS / entry.folder

    def create(self, index: BankIndex) -> None:
        """Make the folder of a bank.

        Raises:
            FileExistsError: a bank or something else is there.
            NotADirectoryError: a file stands at `path` or above it.
        """
        for part in (self.path, *self.path.parents):
            if part.exists() and not part.is_dir():
                raise NotADirectoryError(f"cannot make a bank at {self.path}: {part} is a file, not a folder")
        if (self.path / INDEX).exists():
            raise FileExistsError(f"{self.path} is a bank already; LoRABank.open opens it")
        foreign = [p.name for p in self._entries() if p.name not in (LOCK, SHARDS) and not _temporary(p.name)]
        if foreign:
            raise FileExistsError(
                f"{self.path} is not empty ({foreign[0]} is there); name a new folder for the bank"
            )
        (self.path / SHARDS).mkdir(parents=True, exist_ok=True)
        with self.locked():
            if (self.path / INDEX).exists():
                raise FileExistsError(f"{self.path} is a bank already; LoRABank.open opens it")
            self._put_index(index)

    def read(self) -> BankIndex:
        """The bank as it is on disk now.

        Raises:
            FileNotFoundError: no bank there.
            ConfigError: `bank.json` is of another format, or a field is wrong.
        """
        path = self.path / INDEX
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"no bank at {self.path}: {INDEX} is missing; LoRABank.create makes one"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else data
            raise ConfigError(f"{path}: format: {found!r} is not {FORMAT!r}, the one this version reads")
        try:
            return BankIndex.model_validate(data)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, BankIndex, where=str(path))) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the bank alone while the context lasts; the system lets go when the process dies.

        Raises:
            BankLocked: somebody holds it.
        """
        lock = filelock.FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise BankLocked(
                f"the bank at {self.path} is being changed by {self._holder()}; try again when that is done"
            ) from None
        try:
            with contextlib.suppress(OSError):  # a courtesy to others; a full disk must not stop a deletion
                (self.path / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            with contextlib.suppress(OSError):
                os.truncate(self.path / LOCK, 0)
            lock.release()

    def _holder(self) -> str:
        try:
            return (self.path / LOCK).read_text() or "another process"
        except OSError:
            return "another process"

    def commit(self, index: BankIndex, new: Mapping[str, Files]) -> None:
        """Make `index` the bank, with the folders `new`; all of it or, when anything fails, nothing.

        Call it `locked`. What the index no longer names is deleted at the end.

        Raises:
            OSError: a full disk, say; a note tells whether the bank has changed.
        """
        before = self.read()
        try:
            for folder, files in new.items():
                self._put_folder(folder, files)
            self._put_index(index)
            self.clean()
        except Exception as error:
            now = self.read()
            with contextlib.suppress(OSError):
                self.clean()
            if now == before:
                error.add_note(f"the bank at {self.path} is as it was")
            else:
                error.add_note(f"the bank at {self.path} has changed; open it again to delete old files")
            raise

    def clean(self) -> None:
        """Delete what `bank.json` does not name. Call it `locked`."""
        named = {entry.folder for entry in self.read().shards.values()}
        shards = self.path / SHARDS
        for path in sorted(shards.iterdir()) if shards.is_dir() else []:
            if path.name in named:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for path in self._entries():
            if _temporary(path.name):
                path.unlink()

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []

    def _put_folder(self, folder: str, files: Files) -> None:
        final = self.path / SHARDS / folder
        if final.is_dir():  # the same bytes, by their hash in its name
            return
        temporary = final.with_name(f".{folder}.tmp")
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        os.rename(temporary, final)
        _sync(final.parent)

    def _put_index(self, index: BankIndex) -> None:
        shards = {name: index.shards[name].model_dump() for name in sorted(index.shards)}
        write_text(self.path / INDEX, to_json({**index.model_dump(), "shards": shards}))
        _sync(self.path)


def folder_of(name: str, files: Files) -> str:
    """The name of the folder of a shard: that of the shard and a hash of all its files."""
    parts = [(file, hashlib.sha256(data).hexdigest()) for file, data in sorted(files.items())]
    return f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can be that of a shard, part of the name of a folder."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise ValueError(
            f"{name!r} cannot name a shard: use up to 64 letters, digits, '_', '-' and single '.', the first a letter "
            "or digit"
        )


def to_json(data: dict) -> str:
    """One text for the same data."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _temporary(name: str) -> bool:
    return name.startswith(f".{INDEX}.") and name.endswith(".tmp")


def _sync(folder: Path) -> None:
    """Have the names in `folder` on disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
