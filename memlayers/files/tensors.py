"""Tensors in safetensors files: each with a checksum, so that what is read is what was written."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checksums import json_checksum, start_of_checksum
from .safe import bytes_of, write_metadata, write_safetensors
from .texts import CHECKSUM, DamagedFile, parse_json
from .whole import write_whole

CHECKSUMS = "checksums"
"""Field of a file's metadata that holds the checksum of each tensor."""
TOLD = "take a copy that is whole, or read it with verify=False"
UNKNOWN = "0" * 32
"""What stands in the place of a checksum until it is known; as long as one."""
PIECE = 1 << 19
"""Bytes that stay in a processor's cache between two looks at them."""
THREADS = min(4, os.cpu_count() or 1)
FORKED = threading.Event()
"""Set in a forked process, where torch may refuse to work in a new thread (`Invalid thread pool`)."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FORKED.set)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file whole or not at all, with checksums in its metadata.

    Args:
        tensors: of any device; written as they are on the CPU.
        metadata: what else the file says of itself; `checksums` and `checksum` are taken.

    Returns:
        The checksum of the file's contents, for another file to record.

    Raises:
        ValueError: a tensor is not finite; names file and tensor.
        OSError: as `write_whole`.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fields = dict(metadata)

    def write(temporary: Path) -> None:
        with looking_at(path, plain) as sums:  # goes on while the tensors are written
            unknown = {CHECKSUMS: json.dumps(dict.fromkeys(plain, UNKNOWN)), CHECKSUM: UNKNOWN}
            write_safetensors(temporary, plain, {**metadata, **unknown})
        fields[CHECKSUMS] = json.dumps(sums)
        fields[CHECKSUM] = json_checksum(fields)
        write_metadata(temporary, plain, fields)

    write_whole(path, write)
    return fields[CHECKSUM]


def read_tensors(
    path: str | Path,
    *,
    verify: bool = True,
    required: bool = True,
    recorded: str | None = None,
    device: torch.device | str | None = None,
    finite: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file that `write_tensors` wrote, and its metadata.

    Args:
        verify: compare the checksums; False takes what is there.
        required: whether there must be checksums; False takes a file without, as other programs write it.
        recorded: the checksum that another file has of this one, None where none has.
        device: where to copy the tensors; None: they are views of the file, on the CPU.
        finite: refuse numbers that are not finite though their checksums fit; False leaves that look to the caller.

    Raises:
        FileNotFoundError: nothing at `path`.
        IsADirectoryError: a folder stands at `path`.
        DamagedFile: not a safetensors file, or not as it was written; names file and tensor.
        ValueError: checksums that fit numbers which are not finite, as we write none.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file of tensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is cut short or not a safetensors file ({error})") from None
    except Exception as error:  # sizes that contradict each other; what is raised depends on the version
        raise DamagedFile(f"{path} is not a safetensors file that can be read ({error})") from None
    sums = None
    if verify and (required or CHECKSUM in metadata):
        sums = _sums(path, tensors, metadata, recorded)
    copies = {} if device is None else {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    with looking_at(path, tensors if sums is not None else {}, copies, finite) as found:
        pass
    for name in sums or {}:
        if found[name] != sums[name]:
            raise DamagedFile(f"{path}: tensor {name!r} is not as it was written; {TOLD}")
    if device is not None:
        if sums is None:
            for name, copy in copies.items():
                copy.copy_(tensors[name])
        tensors = {name: copy.to(device) for name, copy in copies.items()}
    return tensors, {k: v for k, v in metadata.items() if k not in (CHECKSUMS, CHECKSUM)}


def _sums(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], recorded: str | None
) -> dict[str, str]:
    """The checksums that a file has of its tensors; DamagedFile unless its metadata is what was written."""
    fields = {k: v for k, v in metadata.items() if k != CHECKSUM}
    if CHECKSUM not in metadata or CHECKSUMS not in metadata:
        raise DamagedFile(f"{path} has no checksums; {TOLD}")
    if metadata[CHECKSUM] != json_checksum(fields):
        raise DamagedFile(f"{path}: its metadata is not as it was written; {TOLD}")
    if recorded is not None and metadata[CHECKSUM] != recorded:
        raise DamagedFile(f"{path} is the file of another checkpoint or of another save; {TOLD}")
    sums = parse_json(metadata[CHECKSUMS], f"{path}: {CHECKSUMS}")
    if not isinstance(sums, dict):
        raise DamagedFile(f"{path}: {CHECKSUMS} in its metadata is no list of tensors; {TOLD}")
    for name in sorted(sums.keys() ^ tensors.keys()):
        told = "was not written" if name in tensors else "is missing"
        raise DamagedFile(f"{path}: tensor {name!r} {told}; {TOLD}")
    return sums


class _OneByOne(Executor):
    """Does at once what it is given, in the thread of the caller."""

    def submit(self, function, /, *args, **options) -> Future:
        done = Future()
        done.set_result(function(*args, **options))
        return done


@contextmanager
def looking_at(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    copies: Mapping[str, torch.Tensor] | None = None,
    finite: bool = True,
) -> Iterator[dict[str, str]]:
    """Fill a dictionary with the checksums of tensors, in threads, while the context goes on; it is whole at its end.

    Args:
        tensors: contiguous, on the CPU.
        copies: tensors like them by the same names, to be filled with them.
        finite: look whether the numbers are finite too.

    Raises:
        ValueError: a number is not finite; names the file and the tensor.
    """
    copies = copies or {}
    sums: dict[str, str] = {}
    with _OneByOne() if FORKED.is_set() else ThreadPoolExecutor(THREADS) as pool:
        looks = {
            name: pool.submit(_look, name, tensor, copies.get(name), finite)
            for name, tensor in tensors.items()
        }
        try:
            yield sums
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for name, look in looks.items():
            sums[name], is_sound = look.result()
            if not is_sound:
                pool.shutdown(cancel_futures=True)
                raise ValueError(f"{path}: tensor {name!r} holds nan or inf")


@torch.no_grad()
def _look(
    name: str, tensor: torch.Tensor, copy: torch.Tensor | None = None, finite: bool = True
) -> tuple[str, bool]:
    """A tensor's checksum and, if asked, whether it is finite, piece by piece, so that it comes from memory once; and its
    copy."""
    digest, extremes = start_of_checksum(name, tensor), []
    pieces = bytes_of(tensor).split(PIECE) if tensor.numel() else ()
    places = pieces if copy is None else bytes_of(copy).split(PIECE)
    for piece, place in zip(pieces, places):
        piece = piece if copy is None else place.copy_(piece)
        digest.update(piece.numpy())
        extremes += extremes_of(piece.view(tensor.dtype)) if finite else []
    return digest.hexdigest(), not extremes or bool(torch.isfinite(torch.stack(extremes)).all())


def check_finite(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError that names the file and the tensor unless all numbers are finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path}: tensor {name!r} holds nan or inf")


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is nan or inf; ten times as fast as `isfinite`, because it makes no mask."""
    extremes = extremes_of(tensor)
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())


def extremes_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The least and the largest number of a tensor, nan where it has one; [] of whole numbers, and of none."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return []
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.itemsize == 1:  # float8 has no order in torch
        tensor = tensor.to(torch.float32)
    return list(torch.aminmax(tensor))


def check_tensors(
    path: Path,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    stray: str,
    config: str,
) -> None:
    """Raise ValueError unless a file's tensors have the names, shapes and kinds of numbers of those expected.

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
        if tensor.is_floating_point() != found[name].is_floating_point():
            raise ValueError(
                f"{path}: tensor {name!r} has numbers of {found[name].dtype}, not {tensor.dtype}"
            )
