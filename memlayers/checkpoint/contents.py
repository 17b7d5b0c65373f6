"""What is in a checkpoint: the fields of memory_config.json, and the files that it says were written with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..adapters import FOLDER as ADAPTERS
from ..config import ConfigError
from ..files import DamagedFile, file_checksum, read_json, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, BASE = "memory_config.json", "memory.safetensors", "base"
FORMAT, WITHOUT_CHECKSUMS = 2, 1
REQUIRED = {"format": int, "base": dict, "memories": dict}
OPTIONAL = {"memlayers_version": str, "adapters": list, "active_adapters": list, "files": dict}
READ_OF_BASE = ("config.json", "generation_config.json", "adapter_config.json")
"""Files that `from_pretrained` reads in a folder, beside those whose names end as weights do."""
ENDINGS = (".safetensors", ".bin", ".index.json")


def read_config(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The checked contents of `memory_config.json`.

    Args:
        verify: compare its checksum; False takes what is there, as earlier versions wrote it too.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: no JSON, or not what was written.
        ConfigError: a field is missing, unknown or wrong; names file and field.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a memlayers checkpoint: {CONFIG} is missing")
    config = read_json(path, verify=False)
    if "format" not in config:
        raise ConfigError(f"{path}: format: this field is required")
    if config["format"] == WITHOUT_CHECKSUMS and verify:
        raise ConfigError(
            f"{path}: format: {WITHOUT_CHECKSUMS} is that of earlier versions, whose files have no checksums; "
            "ml.load(folder, verify=False) reads it, and ml.save writes it anew"
        )
    if config["format"] not in (FORMAT, WITHOUT_CHECKSUMS):
        raise ConfigError(
            f"{path}: format: {str(config['format'])[:40]} is not {FORMAT}, the one this version reads"
        )
    if verify:
        config = read_json(path)
    _check_fields(path, config, needs_files=verify)
    return config


def _check_fields(path: Path, config: dict[str, Any], needs_files: bool) -> None:
    known = {**REQUIRED, **OPTIONAL}
    for field in config:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{path}: {field[:80]}: there is no such field{hint}")
    for field in [*REQUIRED, *(["files"] if needs_files else [])]:
        if field not in config:
            raise ConfigError(f"{path}: {field}: this field is required")
    for field, kind in known.items():
        if field in config and type(config[field]) is not kind:
            told = {dict: "a mapping of fields", list: "a list", str: "a text", int: "a number"}[kind]
            raise ConfigError(f"{path}: {field}: expected {told}, got {str(config[field])[:80]!r}")
    for field in ("name_or_path", "trained_from"):
        if not isinstance(value := config["base"].get(field), str | None):
            raise ConfigError(f"{path}: base.{field}: expected a folder or a hub id, got {str(value)[:80]!r}")
    for name, recorded in config.get("files", {}).items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or not isinstance(recorded, str):
            raise ConfigError(f"{path}: files: {name[:80]!r} cannot be a file of this folder with a checksum")


def has_base(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the base that a config names was saved with it. Any other name is a folder or hub id as transformers has
    them: nothing else beside the memory is taken for the base."""
    if config["base"].get("name_or_path") != BASE:
        return False
    return f"{BASE}/config.json" in config["files"] if "files" in config else (folder / BASE).is_dir()


def name_beside(folder: Path, name: str | None) -> str | None:
    """How memory_config.json names a base: a folder beside the checkpoint's own as `../NAME`, so that both may be moved
    together; anything else as it is."""
    if not name or not Path(name).is_dir() or Path(name).resolve().parent != folder.resolve().parent:
        return name
    return f"../{Path(name).resolve().name}"


def place_of(folder: Path, name: str | None) -> str | None:
    """Where the base is that a checkpoint in `folder` names; the reverse of `name_beside`."""
    beside = name is not None and re.fullmatch(r"\.\./(?!\.\.?$)[^/]+", name)
    return str(folder.resolve().parent / name[3:]) if beside else name


def is_read(name: str) -> bool:
    """Whether `load` reads a file of this name; others, such as tokenizers, may be changed by hand."""
    first, *rest = PurePosixPath(name).parts
    if first == BASE and len(rest) == 1:
        return rest[0] in READ_OF_BASE or rest[0].endswith(ENDINGS)
    return name == WEIGHTS or first == ADAPTERS


def _of_ours(name: str) -> bool:
    """Whether a file of this name has checksums of its own in it."""
    return is_read(name) and name.endswith(".safetensors") and not name.startswith(f"{BASE}/")


def is_whole(folder: Path, name: str, recorded: str) -> bool:
    """Whether a file is there and is the one that was recorded."""
    path = folder / name
    if not path.is_file():
        return False
    if not _of_ours(name):
        return file_checksum(path) == recorded
    try:
        read_tensors(path, recorded=recorded)
    except (DamagedFile, OSError):
        return False
    return True


@contextmanager
def checking(folder: Path, config: dict[str, Any], *, with_base: bool) -> Iterator[None]:
    """Raise FileNotFoundError or DamagedFile unless the files that `load` reads are those that were written. The base's
    tensors are compared in a thread while the context goes on, all else before it; files with checksums of their own
    are compared when they are read.

    Args:
        with_base: whether the base beside the memory is read too.
    """
    files = {n: recorded for n, recorded in config["files"].items() if is_read(n)}
    files = {n: recorded for n, recorded in files.items() if with_base or not n.startswith(f"{BASE}/")}
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; the checkpoint is not whole")
    for name in strays(folder, files) if with_base else []:
        raise DamagedFile(
            f"{folder / name} was not written with this checkpoint, and would be read as a part of its base; move it away"
        )
    compared = [name for name in files if not _of_ours(name)]
    with ThreadPoolExecutor(1) as pool:
        compared.sort(key=lambda name: name.endswith(".safetensors"))
        found = {name: pool.submit(file_checksum, folder / name) for name in compared}
        try:
            for name in compared:
                if not name.endswith(".safetensors"):
                    _compare(folder / name, found[name].result(), files[name])
            yield
        finally:  # an error that comes of a damaged file is about that file
            for name in compared:
                _compare(folder / name, found[name].result(), files[name])


def _compare(path: Path, found: str, recorded: str) -> None:
    if found != recorded:
        raise DamagedFile(
            f"{path} is not as it was written; take a copy of the checkpoint that is whole, or, where the file was changed "
            "by hand, read it with verify=False"
        )


def strays(folder: Path, expected: Collection[str]) -> list[str]:
    """Files in the base's folder that `from_pretrained` would read, and that are not among those expected."""
    found = (folder / BASE).iterdir() if (folder / BASE).is_dir() else []
    names = sorted(f"{BASE}/{path.name}" for path in found)
    return [name for name in names if is_read(name) and name not in expected]


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """What of a base a memory was made for."""
    config = model.config.get_text_config(decoder=True)
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {field: getattr(config, field, None) for field in fields}
