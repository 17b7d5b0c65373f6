"""Texts and JSON: written whole, read with an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checksums import json_checksum
from .whole import write_whole

CHECKSUM = "checksum"
"""Field of a JSON file that holds the checksum of its other fields."""


class DamagedFile(ValueError):
    """A file that is not as it was written, or that is none of ours. The message names it."""


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; raises as `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def read_text(path: str | Path) -> str:
    """A UTF-8 text, without the mark that some editors put before it.

    Raises:
        FileNotFoundError: nothing at `path`.
        DamagedFile: not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of its fields, whole or not at all; raises as `write_whole`."""
    plain = json.loads(json.dumps(data))  # tuples as lists, keys as strings: as they will be read
    text = json.dumps({**plain, CHECKSUM: json_checksum(plain)}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def read_json(path: str | Path, *, verify: bool = True, required: bool = True) -> dict[str, Any]:
    """The fields of a JSON file that `write_json` wrote, without the checksum.

    Args:
        verify: compare the checksum; False takes what is there.
        required: whether there must be one; False takes a file without, as others or earlier versions wrote it.

    Raises:
        FileNotFoundError: nothing at `path`.
        DamagedFile: no JSON, no mapping of fields, or not what was written.
    """
    data = parse_json(read_text(path), str(path))
    if not isinstance(data, dict):
        raise DamagedFile(f"{path}: expected a mapping of fields, got {str(data)[:80]!r}")
    recorded = data.pop(CHECKSUM, None)
    if recorded is None and (not verify or not required):
        return data
    if recorded is None:
        raise DamagedFile(f"{path}: {CHECKSUM}: this field is required; verify=False reads the file without")
    if verify and recorded != json_checksum(data):
        raise DamagedFile(
            f"{path}: not as it was written: its {CHECKSUM} is another one. Take a copy that is whole, or, where it "
            "was changed by hand, read it with verify=False"
        )
    return data


def parse_json(text: str | bytes, where: str) -> Any:
    """Any JSON value; raises DamagedFile that starts with `where`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise DamagedFile(f"{where}: not readable as JSON (nested too deeply)") from None
    except ValueError as error:
        raise DamagedFile(f"{where}: not readable as JSON ({error})") from None
