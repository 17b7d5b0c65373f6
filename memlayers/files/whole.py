"""A file that is the old one or the new one, whole: a temporary name beside it, fsync, rename, fsync of its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left over is not told from what a live one is writing
    fcntl = None

OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How errors of safetensors, which is written in Rust, give the number of an error of the system."""

OF_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
}
"""Numbers of errors that say that something cannot be written."""
TOLD = "cannot write"


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result at `path` in one step.

    A new file gets the mode that the umask says, one that replaces another the mode of that. A link at `path` is
    replaced, and what it points to stays as it is.

    Raises:
        IsADirectoryError: a folder stands at `path`.
        NotADirectoryError: a file stands where the folder of `path` should be.
        FileExistsError: something stands at `path` that is no file: a socket, a pipe, a device.
        OSError: the disk is full, say; names `path`. What stood there stands still, and nothing is left over.
    """
    path = Path(path)
    check_place(path)
    make_folder(path.parent)
    with telling(path):
        remove_leftovers(path)
        temporary = path.with_name(f".{path.name[:180]}.memlayers-{secrets.token_hex(8)}.tmp")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            _lock(handle)
            mode = mode_of(path) or stat.S_IMODE(os.fstat(handle).st_mode)
            os.chmod(temporary, mode)
            write(temporary)
            os.chmod(temporary, mode)  # of what `write` may have put in its place
            sync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        sync_folder(path.parent)


def check_place(path: Path) -> None:
    """Raise IsADirectoryError or FileExistsError unless a file can be put at `path`."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: a folder stands there; name a file")
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
        raise FileExistsError(f"cannot write {path}: what stands there is no file; name another")


def mode_of(path: Path) -> int | None:
    """The mode of the file at `path`, None where there is none, or a link."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and have their names on disk.

    Raises:
        NotADirectoryError: a file stands at `path` or above it; names it.
        OSError: the folder cannot be made; names it.
    """
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"cannot write into {path}: {part} is a file, not a folder")
    missing = [part for part in (path, *path.parents) if not part.exists()]
    with telling(path):
        path.mkdir(parents=True, exist_ok=True)
        for part in missing:
            sync_folder(part.parent)


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Raise errors of the disk as OSError of the same number that names what was being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number is None:
            raise
        why = os.strerror(number)
        told = OSError(number, f"{TOLD} {path}: {why}. What stood there before is as it was")
        raise told from error


def _number(error: Exception) -> int | None:
    """The number of an error of the disk; None for other errors, and for one that names what was being written."""
    if isinstance(error, OSError):
        return error.errno if error.errno in OF_DISK and not str(error.strerror).startswith(TOLD) else None
    found = OF_RUST.search(str(error))
    return int(found[1]) if found else None


def sync_file(path: Path) -> None:
    """Have the contents of a file on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk, where the system can do that."""
    if os.name == "posix":
        with contextlib.suppress(PermissionError):  # one that may be written and not read
            sync_file(path)


def sync_tree(folder: Path) -> None:
    """Have all files and names under a folder on disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(place, name))
        sync_folder(Path(place))


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of earlier tries: files of our temporary names that nobody holds."""
    own = re.compile(re.escape(f".{path.name[:180]}.memlayers-") + r"[0-9a-f]{16}\.tmp")
    names = os.listdir(path.parent) if fcntl else []
    for name in filter(own.fullmatch, names):
        with contextlib.suppress(OSError):  # held by its writer, or gone
            handle = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                found = os.fstat(handle)
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                    _lock(handle)
                    os.unlink(path.parent / name)
            finally:
                os.close(handle)


def _lock(handle: int) -> None:
    """Hold an open file; raises BlockingIOError where another does."""
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
