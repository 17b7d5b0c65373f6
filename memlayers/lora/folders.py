"""The folder of a shard: its files as they are proven by their SHA-256, and deletion of nothing but them.

Links are never followed: not at the folder, not at a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path

from ..files import DamagedFile, sync_folder, telling
from .index import DOCUMENTS, MANIFEST, SHARD_FILES, Files, sha256

TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, sorted(SHARD_FILES)))})\.memlayers-[0-9a-f]{{16}}\.tmp")
"""What `write_whole` leaves of a file of a shard when it is killed."""
TOLD = "bank.repair() tells what can be mended"


def read_file(folder: Path, name: str, expected: str) -> bytes:
    """A file of a shard.

    Args:
        expected: its sha256.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it has another sha256, or a link or something else stands in its place.
    """
    data = plain_bytes(folder, name)
    if sha256(data) != expected:
        raise DamagedFile(
            f"{folder / name} is damaged: its sha256 is {sha256(data)[:12]}…, not {expected[:12]}… as it was written; "
            f"{TOLD}"
        )
    return data


def plain_bytes(folder: Path, name: str) -> bytes:
    """What a file of a shard holds, right or wrong; raises as `read_file` where there is no file."""
    path = folder / name
    check_folder(folder)
    mode = _mode(path)
    if mode is None:
        raise FileNotFoundError(f"{path} is missing; the shard is not whole: {TOLD}")
    if not stat.S_ISREG(mode):
        raise DamagedFile(f"{path} is a link or no file; a bank follows no links: put the file in its place")
    return path.read_bytes()


def check_folder(folder: Path) -> None:
    """Raise FileNotFoundError or DamagedFile unless `folder` is one, and no link to one."""
    mode = _mode(folder)
    if mode is None:
        raise FileNotFoundError(f"{folder} is missing; the shard is not whole: {TOLD}")
    if not stat.S_ISDIR(mode):
        raise DamagedFile(
            f"{folder} is a link or no folder; a bank follows no links: put the folder in its place"
        )


def check_deletable(folder: Path) -> None:
    """Raise FileExistsError where deletion of a shard's folder would not delete all that is in it; one that is missing
    is deleted.

    That is: a link, whose target would stay; a file that has another name elsewhere; a file that is not ours.
    """
    mode = _mode(folder)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise FileExistsError(
            f"{folder} is a link or no folder, and what it stands for would stay: delete the target and the link, and "
            "try again. Nothing was changed"
        )
    for name in sorted(os.listdir(folder)):
        path, found = folder / name, os.lstat(folder / name)
        if not _is_ours(name):
            raise FileExistsError(
                f"{path} is not ours and is not deleted: move it away, and try again. Nothing was changed"
            )
        if not stat.S_ISREG(found.st_mode):
            raise FileExistsError(
                f"{path} is a link or no file, and what it stands for would stay: delete the target and the link, and "
                "try again. Nothing was changed"
            )
        if found.st_nlink > 1:
            raise FileExistsError(
                f"{path} has another name elsewhere (find / -samefile {path}), and its text would stay there: delete "
                "that one, and try again. Nothing was changed"
            )


def write_folder(folder: Path, files: Files, mode: int) -> None:
    """Write a new folder and have it on disk.

    Args:
        mode: of its files, less what the umask takes away.

    Raises:
        FileExistsError: something is at `folder`.
        OSError: the disk is full, say; names the file. What was written stands.
    """
    with telling(folder):
        os.mkdir(folder, mode | (mode & 0o444) >> 2 | stat.S_IWUSR)
    for name, data in files.items():
        with telling(folder / name):
            handle = os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    with telling(folder):
        sync_folder(folder)
        sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder of a shard, the texts first.

    Raises:
        FileExistsError: it is a link or no folder, and stands as it was; or files that are not ours are in it, and they
            and the folder stay.
        OSError: something cannot be deleted.
    """
    mode = _mode(folder)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise FileExistsError(f"{folder} is a link or no folder; it is not touched: delete it by hand")
    for name in sorted(os.listdir(folder)):
        if _is_ours(name) and stat.S_ISREG(os.lstat(folder / name).st_mode):
            os.unlink(folder / name)
    left = sorted(os.listdir(folder))
    if left:
        raise FileExistsError(f"{folder / left[0]} is not ours and is not deleted: move it away")
    os.rmdir(folder)


def held(folder: Path, documents: Collection[str]) -> list[str]:
    """Which of some documents the texts in a folder have a line of, or its manifest names; damaged or not."""
    found = set()
    with contextlib.suppress(OSError, DamagedFile):
        data = plain_bytes(folder, DOCUMENTS)
        found |= {d for d in documents if json.dumps({"id": d}, ensure_ascii=False)[:-1].encode() in data}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found |= set(json.loads(plain_bytes(folder, MANIFEST))["documents"]) & set(documents)
    return sorted(found)


def _is_ours(name: str) -> bool:
    return name in SHARD_FILES or TEMPORARY.fullmatch(name) is not None


def _mode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
