"""Writing the safetensors format straight into a file.

The library's own `save_file` makes a temporary file of another name beside the one that it is given, which stays where
the process is killed, and which nobody could tell from a file of the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls a dtype."""


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view (bytes,) uint8 of a contiguous tensor; one number is contiguous with any stride."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file in place.

    Args:
        tensors: contiguous, on the CPU.
        metadata: of the file, beside the tensors.

    Raises:
        TypeError: a dtype that the format has no name for; names the tensor.
        OSError: as `open` and `write`.
    """
    header = _header(tensors, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for name in _order(tensors):
            file.write(bytes_of(tensors[name]).numpy())


def write_metadata(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Put other metadata into a file that was just written with these tensors; as many bytes as before."""
    header = _header(tensors, metadata)
    with open(path, "r+b") as file:
        if file.read(8) != header[:8]:
            raise ValueError(f"{path}: this metadata is not as long as that which it replaces")
        file.seek(0)
        file.write(header)


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Those of wide numbers first, so that each starts at a place that its numbers can be read from."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length of the description of a file, and the description."""
    header, start = {"__metadata__": dict(metadata)}, 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise TypeError(
                f"tensor {name!r} has numbers of {tensor.dtype}, which safetensors files cannot hold"
            )
        place = [start, start + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        start = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
