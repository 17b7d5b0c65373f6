"""Checksums against accidents: XXH3, which is faster than memory is read. They are no defence against forgery."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import torch
import xxhash


def file_checksum(path: str | Path) -> str:
    """XXH3-128 of a file's bytes, in hex; they are looked at where the system has them, and not copied."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # nothing to map
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return xxhash.xxh3_128_hexdigest(mapped)


def json_checksum(data: Any) -> str:
    """XXH3-128 of plain values, however a file lays them out, in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def start_of_checksum(name: str, tensor: torch.Tensor) -> xxhash.xxh3_128:
    """The checksum of a tensor before its bytes are in it: of its name, dtype and shape."""
    return xxhash.xxh3_128(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
