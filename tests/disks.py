"""Small disks for tests of what stands where one is full, or may only be read."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_disk(place: Path, kilobytes: int = 600) -> Iterator[Path]:
    """A disk of its own at `place`, in memory; skips the test where none may be mounted. It goes once nobody uses it: the
    tensors of a base that is loaded stay in its file."""
    place.mkdir()
    size = ["-o", f"size={kilobytes}k"]
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", place], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no command mount here")
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
