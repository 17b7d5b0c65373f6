"""Checkpoints that are whole or not there: folders `step-00000100` that carry their own mark.

One is written under a temporary name, every file flushed to disk, then a file `COMPLETE` with size and checksum of each
other, and only then is the folder renamed. What a kill leaves behind is a temporary folder, which goes when the next
checkpoint is written. A damaged one is renamed and kept. Folders without our marks are those of others: nothing of them
is changed, and where one has the name of a checkpoint the run does not start.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from memlayers.files import file_checksum, sync_folder, telling, write_json

from .processes import all_or_none, on_main

COMPLETE, MARK = "COMPLETE", ".memlayers-checkpoint.json"
STEP = re.compile(r"step-(\d{8,})")
TEMPORARY = re.compile(r"\.tmp-step-\d{8,}-[0-9a-f]{16}")
ASIDE = re.compile(r"damaged-step-\d{8,}(-\d+)?")
LEFT_OF_MARK = re.compile(re.escape(f".{MARK}.memlayers-") + r"[0-9a-f]{16}\.tmp")


# Which folders are ours.


def checkpoints_in(folder: Path) -> list[Path]:
    """Our checkpoints, whole or damaged, oldest first."""
    found = [path for path in _named(folder, STEP) if is_ours(path)]
    return sorted(found, key=step_of)


def strangers_in(folder: Path) -> list[Path]:
    """What has the name of a checkpoint and is none of ours."""
    return [path for path in _named(folder, STEP) if not is_ours(path)]


def set_aside_in(folder: Path) -> list[Path]:
    """Our damaged checkpoints that were set aside."""
    return [path for path in _named(folder, ASIDE) if is_ours(path)]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(STEP.fullmatch(checkpoint.name)[1])


def is_ours(path: Path) -> bool:
    """Whether a folder, no link to one, has a mark that only a checkpoint of ours has."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return False
    return any(is_plain_file(path / name) for name in (MARK, COMPLETE))


def _named(folder: Path, names: re.Pattern) -> list[Path]:
    return sorted(path for path in folder.iterdir() if names.fullmatch(path.name)) if folder.is_dir() else []


def is_plain_file(path: Path) -> bool:
    """Whether a file stands there that is no link."""
    return path.is_file() and not path.is_symlink()


# Setting aside, writing and removing.


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept and not resumed from; returns what it is called now."""
    names = [f"damaged-{checkpoint.name}", *(f"damaged-{checkpoint.name}-{n}" for n in range(2, 1000))]
    aside = next(place for name in names if not os.path.lexists(place := checkpoint.with_name(name)))
    with telling(checkpoint):
        os.rename(checkpoint, aside)
        sync_folder(checkpoint.parent)
    return aside


def write_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    keep: int,
    own: Callable[[Path], None],
    shared: Callable[[Path], None],
) -> Path:
    """Write `folder/step-…` whole or not at all, then remove all of ours but the newest `keep`.

    Every process calls it. Where one of them fails all of them raise, and nothing is left over.

    Args:
        own: writes what each process has of its own into a folder.
        shared: writes what the main process has for all.

    Raises:
        FileExistsError: something else has the name of this checkpoint.
        OSError: the disk is full, say; names what was being written.
        OtherProcessFailed: another process could not write.
    """
    place = folder / f"step-{step:08d}"
    temporary = on_main(accelerator, lambda: _begin(place))
    try:
        all_or_none(accelerator, lambda: own(temporary))
        on_main(accelerator, lambda: _finish(temporary, place, shared))
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    on_main(accelerator, lambda: [remove(old) for old in checkpoints_in(folder)[:-keep]])
    return place


def _begin(place: Path) -> Path:
    """A new temporary folder with our mark; those that kills have left are removed before."""
    if os.path.lexists(place):
        raise FileExistsError(f"{place} is there already and is not replaced; move it away")
    clean(place.parent)
    temporary = _temporary(place)
    with telling(place):
        temporary.mkdir()
        try:
            write_json(temporary / MARK, {"step": step_of(place)})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return temporary


def _finish(temporary: Path, place: Path, shared: Callable[[Path], None]) -> None:
    shared(temporary)
    files = {
        path.name: {"size": path.stat().st_size, "checksum": file_checksum(path)}
        for path in sorted(temporary.iterdir())
    }
    write_json(temporary / COMPLETE, {"step": step_of(place), "files": files})
    with telling(place):
        sync_folder(temporary)
        if os.path.lexists(place):
            raise FileExistsError(f"{place} is there already and is not replaced; move it away")
        os.rename(temporary, place)
        sync_folder(place.parent)


def _temporary(place: Path) -> Path:
    return place.with_name(f".tmp-{place.name}-{secrets.token_hex(8)}")


def clean(folder: Path) -> None:
    """Remove the temporary folders of ours that killed runs have left."""
    for path in _named(folder, TEMPORARY):
        if stat.S_ISDIR(os.lstat(path).st_mode) and (
            is_plain_file(path / MARK) or all(LEFT_OF_MARK.fullmatch(name) for name in os.listdir(path))
        ):
            _delete(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint of ours in such a way that a kill leaves a temporary folder and none that looks whole."""
    if not is_plain_file(checkpoint / MARK):  # of an earlier version
        write_json(checkpoint / MARK, {})
    name = checkpoint.name.removeprefix("damaged-")
    temporary = _temporary(checkpoint.with_name(STEP.match(name)[0]))
    with telling(checkpoint):
        os.rename(checkpoint, temporary)
        sync_folder(checkpoint.parent)
        _delete(temporary)


def _delete(folder: Path) -> None:
    """Delete a temporary folder, its mark last."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.name != MARK:
                shutil.rmtree(path) if stat.S_ISDIR(os.lstat(path).st_mode) else path.unlink()
        shutil.rmtree(folder)
