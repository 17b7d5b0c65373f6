"""Holding a folder: while one process changes it, others wait or are told. The system lets go when the process dies."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from .whole import fcntl, telling

UNKNOWN = "another process"


class FolderInUse(RuntimeError):
    """Another process, or another call of this one, holds a folder. The message says which and where."""


@contextlib.contextmanager
def holding_folder(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Wait until nobody else changes a folder, and keep it so while the context lasts. No file is made.

    Args:
        shared: to read it; several may read at once.

    Where the file system has no such locks (some network disks) it does nothing.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def holding_file(path: str | Path) -> Iterator[None]:
    """Hold a lock file, made where it is missing; while the context lasts it says who holds it.

    Raises:
        FolderInUse: somebody holds it; says who.
        FileExistsError: what stands at `path` is a link, has another name elsewhere, or is no file; it is not touched.
        OSError: the file cannot be made.
    """
    path = Path(path)
    handle = _open(path)
    try:
        _take(handle, path)
        with contextlib.suppress(OSError):  # a courtesy to others; a full disk must not stop a deletion
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    foreign = FileExistsError(f"{path} is a link or no file of ours; it is not touched: move it away")
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise foreign
    try:
        with telling(path):
            handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise foreign from None
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(handle)
        raise foreign
    return handle


def _take(handle: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace") or UNKNOWN
        raise FolderInUse(
            f"{path.parent} is in use by {holder} ({path}); try again when that is done"
        ) from None
