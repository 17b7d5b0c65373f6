"""Several files of one folder that change together: all of them are the old ones, or all are the new ones.

The new files are made in a folder inside, which then gets the name `.memlayers-new`. From then on the change is
decided: its files are moved to their places, and who finds that folder after a kill moves the rest (`settle`). Files
of others in the folder stay as they are.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .checksums import file_checksum
from .locks import holding_folder
from .texts import DamagedFile, read_json, write_json
from .whole import OF_DISK, check_place, make_folder, mode_of, sync_folder, sync_tree, telling

DECIDED, JOURNAL, FILES = ".memlayers-new", "journal.json", "files"
OF_JOURNAL = re.compile(re.escape(f".{JOURNAL}.memlayers-"))
"""How the journal is called while it is being written."""
UNDECIDED = re.compile(re.escape(DECIDED) + "-[0-9a-f]{16}")


@dataclass
class Change:
    """What is to change in a folder.

    Attributes:
        new: a folder to write the new files into, by the names that they shall have.
        remove: names of files that are to go, such as those of an earlier save that the new one does not have.
    """

    new: Path
    remove: list[str] = field(default_factory=list)

    def checksums(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """The checksum of each new file by its name; those that are known are not made again."""
        known, paths = known or {}, sorted(path for path in self.new.rglob("*") if path.is_file())
        names = {path.relative_to(self.new).as_posix(): path for path in paths}
        return {n: known[n] if n in known else file_checksum(path) for n, path in names.items()}


@contextmanager
def together(folder: str | Path) -> Iterator[Change]:
    """Change several files of a folder in one step, at the end of the context; nothing is changed where it raises.

    Raises:
        NotADirectoryError, IsADirectoryError, FileExistsError: something else stands where a file or a folder is to be.
        OSError: the disk is full, say; names the folder. Its files are as they were, and nothing is left over.
    """
    folder = Path(folder)
    make_folder(folder)
    with holding_folder(folder), telling(folder):
        _settle(folder)
        staging = folder / f"{DECIDED}-{secrets.token_hex(8)}"
        try:
            (staging / FILES).mkdir(parents=True)
            change = Change(staging / FILES)
            yield change
            _decide(folder, staging, change)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            _name_places(error, staging / FILES, folder)
            raise
        _apply(folder)


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Keep a folder as it is while the context lasts: as the last change left it, one that a kill interrupted too.

    Raises:
        DamagedFile, OSError: as `settle`.
    """
    folder = Path(folder)
    while True:
        settle(folder)
        with holding_folder(folder, shared=True):
            if not os.path.lexists(folder / DECIDED):  # else another process was killed just now
                yield
                return


def settle(folder: str | Path) -> None:
    """Bring a change to its end that a kill has interrupted.

    Raises:
        DamagedFile: what the interrupted change left is damaged, or not of this folder.
        OSError: the folder cannot be written; names it.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / DECIDED):
        return
    try:
        with holding_folder(folder), telling(folder):
            _settle(folder)
    except OSError as error:
        if error.errno not in OF_DISK:
            raise
        raise OSError(
            error.errno,
            f"{folder} holds a save that was interrupted ({DECIDED}), and cannot be written to bring it to its end "
            f"({os.strerror(error.errno)}); open it once where it can",
        ) from error


def _name_places(error: BaseException, staging: Path, folder: Path) -> None:
    """Have an error about a file that was being made name the place where it should have come."""

    def named(text):
        return text.replace(str(staging), str(folder)) if isinstance(text, str) else text

    error.args = tuple(named(each) for each in error.args)
    if isinstance(error, OSError):
        error.strerror = named(error.strerror)
        if error.filename is not None:
            error.filename = named(error.filename)


def _settle(folder: Path) -> None:
    """As `settle`, by who holds the folder; what undecided changes left over goes."""
    if os.path.lexists(folder / DECIDED):
        _apply(folder)
    for name in filter(UNDECIDED.fullmatch, os.listdir(folder)):
        if _is_ours(folder / name):
            shutil.rmtree(folder / name)


def _is_ours(path: Path) -> bool:
    """Whether a folder of our temporary name holds nothing but what we put into one."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return False
    return all(name in (FILES, JOURNAL) or OF_JOURNAL.match(name) for name in os.listdir(path))


def _decide(folder: Path, staging: Path, change: Change) -> None:
    """Have the new files on disk, and the folder that holds them under the name that counts."""
    names = sorted(
        path.relative_to(change.new).as_posix() for path in change.new.rglob("*") if path.is_file()
    )
    remove = sorted(set(change.remove) - set(names))
    for name in [*names, *remove]:
        _check(folder, name)
    write_json(staging / JOURNAL, {"files": names, "remove": remove})
    new = mode_of(staging / JOURNAL)  # as the umask says; what other libraries write has modes of their own
    for name in names:
        os.chmod(change.new / name, mode_of(folder / name) or new)
    sync_tree(staging)
    os.rename(staging, folder / DECIDED)
    sync_folder(folder)


def _apply(folder: Path) -> None:
    decided = folder / DECIDED
    if not _is_ours(decided) or not (decided / JOURNAL).is_file():
        raise DamagedFile(f"{decided} is no folder of an interrupted save; move it away")
    journal = read_json(decided / JOURNAL)
    touched = set()
    for name in [*journal["files"], *journal["remove"]]:
        _check(folder, name)
    for name in journal["files"]:
        new, place = decided / FILES / name, folder / name
        if new.is_symlink():
            raise DamagedFile(f"{new} is a link, which no save of ours leaves; move {decided} away")
        make_folder(place.parent)
        touched.add(place.parent)
        if new.exists():  # else it was moved before the kill
            os.replace(new, place)
    for name in journal["remove"]:
        (folder / name).unlink(missing_ok=True)
        touched.add((folder / name).parent)
    for place in touched:
        if place.is_dir():
            sync_folder(place)
    for place in sorted({(folder / name).parent for name in journal["remove"]} - {folder}, reverse=True):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    done = folder / f"{DECIDED}-{secrets.token_hex(8)}"
    os.rename(decided, done)
    sync_folder(folder)
    shutil.rmtree(done)


def _check(folder: Path, name: str) -> None:
    """Raise unless `name` is that of a file that may be put into the folder, or removed from it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or pure.parts[0].startswith(DECIDED):
        raise DamagedFile(f"{folder}: {name!r} cannot name a file of it")
    for part in list(pure.parents)[:-1]:
        if (folder / part).is_symlink() or (folder / part).is_mount():
            raise FileExistsError(
                f"cannot write {folder / name}: {folder / part} is a link or a disk of its own; files that change "
                "together must lie in one folder"
            )
        if (folder / part).exists() and not (folder / part).is_dir():
            raise NotADirectoryError(f"cannot write {folder / name}: {folder / part} is a file")
    check_place(folder / name)
