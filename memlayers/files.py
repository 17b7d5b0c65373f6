"""Files that are whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result at `path` in one step.

    Raises:
        IsADirectoryError: a folder stands at `path`.
        NotADirectoryError: a file stands where the folder of `path` should be.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: a folder stands there; name a file")
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_tensors(
    path: Path,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    stray: str,
    config: str,
) -> None:
    """Raise ValueError unless a file's tensors have the names and shapes of those expected; names the file and the tensor.

    Args:
        stray: how to say that a tensor is one too much.
        config: the file that the expected shapes come from.
    """
    for name in expected.keys() ^ found.keys():
        told = "is missing" if name in expected else stray
        raise ValueError(f"{path}: tensor {name!r} {told}; the file belongs to another checkpoint")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(found[name].shape)}, {config} asks for {tuple(tensor.shape)}"
            )


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        NotADirectoryError: a file stands at `path` or above it; names it.
    """
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"cannot write into {path}: {part} is a file, not a folder")
    path.mkdir(parents=True, exist_ok=True)
