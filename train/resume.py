"""Which checkpoint a run goes on from: the newest that is whole, by the checksums that were written with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memlayers.files import DamagedFile, file_checksum, read_json

from .checkpoints import COMPLETE, checkpoints_in, is_plain_file, step_of


class EarlierFormat(ValueError):
    """A checkpoint of an earlier version, without checksums; the message says what to do."""


def check_whole(checkpoint: Path) -> None:
    """Raise unless a checkpoint is as it was written.

    Raises:
        DamagedFile: a file is missing, cut, changed, or of another checkpoint; names it.
        EarlierFormat: it has no checksums.
    """
    complete = checkpoint / COMPLETE
    if not is_plain_file(complete):
        raise DamagedFile(f"{complete} is missing")
    if _is_earlier(read_json(complete, verify=False)):
        raise EarlierFormat(
            f"{checkpoint} was written by an earlier version of memlayers, without checksums: to go on from it "
            "unverified use --resume --no-verify (verify=False), else start anew in another output_dir"
        )
    data = read_json(complete)
    if data.get("step") != step_of(checkpoint) or not isinstance(data.get("files"), dict):
        raise DamagedFile(f"{complete} belongs to step {data.get('step')}")
    for name, written in data["files"].items():
        path = checkpoint / name
        if not is_plain_file(path):
            raise DamagedFile(f"{path} is missing")
        if path.stat().st_size != written["size"]:
            raise DamagedFile(f"{path} has {path.stat().st_size} bytes, {written['size']} were written")
        if file_checksum(path) != written["checksum"]:
            raise DamagedFile(f"{path} is not as it was written: its checksum is another one")


def _is_earlier(data: dict[str, Any]) -> bool:
    """Whether COMPLETE has a size for each file and nothing else, as before there were checksums."""
    return "state.json" in data and all(type(size) is int for size in data.values())


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first; those without checksums are not among them."""
    return [checkpoint for checkpoint in checkpoints_in(folder) if _is_whole(checkpoint)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_whole(checkpoint)
    except (DamagedFile, EarlierFormat):
        return False
    return True


def newest_whole(folder: Path, verify: bool = True) -> tuple[Path | None, list[tuple[Path, DamagedFile]]]:
    """The newest whole checkpoint, and the damaged ones that are newer, with what is wrong with each.

    Args:
        verify: False takes the newest that has a `COMPLETE`, unread.

    Raises:
        EarlierFormat: the newest that is not damaged has no checksums.
    """
    damaged = []
    for checkpoint in reversed(checkpoints_in(folder)):
        if not verify and is_plain_file(checkpoint / COMPLETE):
            return checkpoint, damaged
        try:
            check_whole(checkpoint)
            return checkpoint, damaged
        except DamagedFile as error:
            damaged.append((checkpoint, error))
    return None, damaged
