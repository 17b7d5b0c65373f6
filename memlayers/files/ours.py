"""Telling files that memlayers wrote from those of others: a list with their checksums, and nothing else is replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .checksums import file_checksum


def check_ours(folder: Path, names: Iterable[str], written: Mapping[str, str]) -> None:
    """Raise FileExistsError where a file that is about to be replaced is not as we wrote it.

    Args:
        names: of the files in `folder` that are to be written.
        written: the files that were written there before, with the checksums (`file_checksum`) that they had.
    """
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if path.is_symlink() or not path.is_file() or written.get(name) != file_checksum(path):
            raise FileExistsError(
                f"{path} is not ours, or was changed since it was written: it is not replaced. Move it away, or name "
                "another folder"
            )
