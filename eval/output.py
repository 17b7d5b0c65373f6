"""What an evaluation leaves in a folder: records, reports and pictures, all of one measurement or none of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from memlayers.config import ConfigError
from memlayers.files import (
    DamagedFile,
    check_ours,
    file_checksum,
    read_json,
    read_text,
    settle,
    together,
    write_json,
    write_text,
)

RECORDS, REPORT, WRITTEN = "records.jsonl", "report.json", ".memlayers.json"
"""The last one lists the files that an evaluation wrote into a folder, with their checksums."""


def write_output(
    folder: str | Path,
    texts: Mapping[str, str],
    pictures: Mapping[str, bytes] | None = None,
    report: dict | None = None,
) -> None:
    """Write files into `folder`, all of them or, when anything fails, none.

    Args:
        texts: contents by name of file, such as `report.md`.
        pictures: likewise the bytes of PNGs.
        report: for report.json.

    Raises:
        FileExistsError: a file of such a name is there that no evaluation wrote.
        OSError: the disk is full, say; names the folder.
    """
    folder = Path(folder)
    with together(folder) as change:
        for name, text in texts.items():
            write_text(change.new / name, text)
        for name, data in (pictures or {}).items():
            (change.new / name).write_bytes(data)
        if report is not None:
            write_json(change.new / REPORT, report)
        new = change.checksums()
        before = _written(folder)
        check_ours(folder, new, before)
        write_json(change.new / WRITTEN, {"files": {**before, **new}})


def check_output(folder: str | Path, names: Sequence[str]) -> None:
    """Before a long measurement: raise FileExistsError where its files could not be written for those of others."""
    folder = Path(folder)
    if folder.is_dir():
        settle(folder)
        check_ours(folder, names, _written(folder))


def read_written(path: str | Path) -> str:
    """The text of a file that an evaluation wrote.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is not as it was written.
    """
    path = Path(path)
    settle(path.parent)
    recorded = _written(path.parent).get(path.name)
    if recorded is not None and file_checksum(path) != recorded:
        raise DamagedFile(f"{path}: not as it was written; take a copy that is whole, or measure again")
    return read_text(path)


def read_records(folder: str | Path) -> tuple[dict, list[dict]]:
    """The first line of a run's records.jsonl, which says what was measured, and its records.

    Raises:
        FileNotFoundError: no run wrote there.
        DamagedFile: records.jsonl is not as it was written.
    """
    path = Path(folder) / RECORDS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {RECORDS} is there; measure with memlayers eval --out {folder}"
        )
    try:
        head, *records = [json.loads(line) for line in read_written(path).split("\n") if line]
        head["experiment"], head["config"], head["config_hash"], head["seeds"]
    except DamagedFile:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path}: is no file of records ({error}); measure again") from None
    return head, records


def _written(folder: Path) -> dict[str, str]:
    path = folder / WRITTEN
    if not path.is_file():
        return {}
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise ConfigError(f"{path}: files: expected a mapping of names to checksums")
    return files
