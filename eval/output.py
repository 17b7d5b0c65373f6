"""What an evaluation leaves in a folder: reports, rows, tables and pictures, all of one measurement or none of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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

REPORT, SAMPLES, WRITTEN = "report.json", "samples.jsonl", ".memlayers.json"
"""The last one lists the files that an evaluation wrote into a folder, with their checksums."""
Pictures = Mapping[str, Callable[[Path], None]]
"""Names of files to what draws them at a path."""


def write_output(
    folder: str | Path,
    texts: Mapping[str, str],
    pictures: Pictures | None = None,
    report: dict | None = None,
    samples: Sequence[dict] | None = None,
) -> None:
    """Write files into `folder`, all of them or, when anything fails, none.

    Args:
        texts: contents by name of file, such as `report.md`.
        pictures: likewise what is drawn.
        report: for report.json.
        samples: the rows of samples.jsonl; the report then has their checksum.

    Raises:
        FileExistsError: a file of such a name is there that no evaluation wrote.
        OSError: the disk is full, say; names the folder.
    """
    folder = Path(folder)
    with together(folder) as change:
        for name, text in texts.items():
            write_text(change.new / name, text)
        for name, draw in (pictures or {}).items():
            draw(change.new / name)
        if samples is not None:
            write_text(
                change.new / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
            )
            report = {**(report or {}), "samples_checksum": file_checksum(change.new / SAMPLES)}
        if report is not None:
            write_json(change.new / REPORT, report)
        new = {path.name: file_checksum(path) for path in sorted(change.new.iterdir())}
        before = _written(folder)
        check_ours(folder, new, before)
        write_json(change.new / WRITTEN, {"files": {**before, **new}})


def check_output(folder: str | Path, names: Sequence[str] = (REPORT, SAMPLES)) -> None:
    """Before a long measurement: raise FileExistsError where its files could not be written for those of others."""
    folder = Path(folder)
    if folder.is_dir():
        settle(folder)
        check_ours(folder, names, _written(folder))


def read_report(path: str | Path) -> dict:
    """What a report.json holds; one of an earlier version has no checksum and is taken as it is.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is not as it was written.
    """
    path = Path(path)
    settle(path.parent)
    return read_json(path, required=False)


def read_samples(folder: Path, report: dict) -> list[dict]:
    """The rows of the samples.jsonl that belongs to a report; raises as `read_report`."""
    path = folder / SAMPLES
    recorded = report.get("samples_checksum")
    if recorded is not None and file_checksum(path) != recorded:
        raise DamagedFile(f"{path}: not as it was written with {folder / REPORT}; measure again")
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def _written(folder: Path) -> dict[str, str]:
    path = folder / WRITTEN
    if not path.is_file():
        return {}
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise ConfigError(f"{path}: files: expected a mapping of names to checksums")
    return files
