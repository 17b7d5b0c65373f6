"""Seeded damage to files of ours, and what loading makes of it: an error that names the file, or what was written, bit for bit.

`MEMLAYERS_FUZZ=2000` sets how often; the suite does it a few times only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memlayers.files import checksums
from memlayers.files.tensors import CHECKSUMS, _look
from memlayers.files.texts import CHECKSUM

TRIALS = int(os.environ.get("MEMLAYERS_FUZZ", "150"))
LENGTHS = (-5, -(10**9), 10**9, 2**31, 2**62)


@dataclass
class Target:
    """A file that is to be damaged.

    Attributes:
        path: of the file, in a folder that may be damaged.
        others: whole files that another save wrote under the same name.
    """

    path: Path
    others: list[Path]


def flip_bits(rng: random.Random, target: Target) -> None:
    data = bytearray(target.path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    target.path.write_bytes(data)


def flip_header(rng: random.Random, target: Target) -> None:
    """A bit of what says where the tensors are, or of the start of a text."""
    data = bytearray(target.path.read_bytes())
    tensors = target.path.suffix == ".safetensors"
    end = 8 + int.from_bytes(data[:8], "little") if tensors else min(200, len(data))
    data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    target.path.write_bytes(data)


def cut(rng: random.Random, target: Target) -> None:
    os.truncate(target.path, rng.randrange(target.path.stat().st_size))


def lengthen(rng: random.Random, target: Target) -> None:
    with open(target.path, "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def zero(rng: random.Random, target: Target) -> None:
    data = bytearray(target.path.read_bytes())
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((4, 64, 512, 4096)))
    data[start:stop] = bytes(stop - start)
    target.path.write_bytes(data)


def swap(rng: random.Random, target: Target) -> None:
    shutil.copy(rng.choice(target.others), target.path)


def delete(rng: random.Random, target: Target) -> None:
    target.path.unlink()


def empty(rng: random.Random, target: Target) -> None:
    target.path.write_bytes(b"")


def put_folder(rng: random.Random, target: Target) -> None:
    target.path.unlink()
    target.path.mkdir()


def rewrite_tensors(change: Callable[[random.Random, torch.Tensor], torch.Tensor | None]):
    """One of the tensors that `change` can change is another one; the rest of the file, its checksums too, as it was."""

    def damage(rng: random.Random, target: Target) -> None:
        with safe_open(target.path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        names = sorted(name for name, tensor in tensors.items() if change(rng, tensor) is not None)
        if names:
            name = rng.choice(names)
            tensors[name] = change(rng, tensors[name])
        save_file(tensors, target.path, metadata=metadata)

    damage.__qualname__ = change.__name__.strip("_")
    return damage


def _recast(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8]
    return tensor.to(rng.choice([dtype for dtype in dtypes if dtype != tensor.dtype]))


def _not_finite(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor | None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    tensor = tensor.clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))
    return tensor


def _length(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if tensor.dtype != torch.int64 else torch.full_like(tensor, rng.choice(LENGTHS))


def change_field(rng: random.Random, target: Target) -> None:
    """One value of a JSON file is another one; its checksum as it was."""
    data = json.loads(target.path.read_bytes())
    at = data
    while isinstance(at, dict | list) and at:
        holder, key = at, rng.choice(sorted(at)) if isinstance(at, dict) else rng.randrange(len(at))
        at = at[key]
    if rng.random() < 0.2 and isinstance(holder, dict):
        holder[f"{key}s"] = holder.pop(key)
    else:
        values = [None, True, -1, 0, 3, 10**9, 2**70, 0.5, "", "x", "../../x", [], ["x"], {}, {"type": ["x"]}]
        holder[key] = rng.choice([v for v in values if v != at or type(v) is not type(at)])
    target.path.write_text(json.dumps(data))


ANY = [flip_bits, flip_bits, flip_header, cut, lengthen, zero, swap, delete, empty, put_folder]
OF_TENSORS = [rewrite_tensors(_recast), rewrite_tensors(_not_finite), rewrite_tensors(_length)]
OF_JSON = [change_field, change_field]


def damage(rng: random.Random, target: Target) -> str:
    """Damage a file, and say how; it may come out as it was."""
    more = OF_TENSORS if target.path.suffix == ".safetensors" else OF_JSON
    how = rng.choice(ANY + more)
    how(rng, target)
    return f"{how.__qualname__.partition('.')[0]} of {target.path.name}"


def outcome(load: Callable[[], str], right: str, names: list[str]) -> str:
    """What came of a load: "refused", "right", or what is wrong with it.

    Args:
        load: gives what stands for all that was loaded.
        right: what that is of the whole file.
        names: one of which an error has to name.
    """
    try:
        found = load()
    except (ValueError, OSError) as error:
        return "refused" if any(name in str(error) for name in names) else f"UNNAMED {error!r}"
    except BaseException as error:
        return f"ANOTHER ERROR {error!r}"[:500]
    return "right" if found == right else "SILENTLY WRONG"


def with_new_checksums(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """Change the tensors of a file as somebody would who makes its checksums anew, also to what we would not write.

    Returns:
        The checksum of the file's contents.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        fields = {k: v for k, v in file.metadata().items() if k not in (CHECKSUM, CHECKSUMS)}
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sums = {name: _look(name, tensor)[0] for name, tensor in tensors.items()}
    fields[CHECKSUMS] = json.dumps(sums, sort_keys=True)
    fields[CHECKSUM] = checksums.json_checksum(fields)
    save_file(tensors, path, metadata=fields)
    return fields[CHECKSUM]
