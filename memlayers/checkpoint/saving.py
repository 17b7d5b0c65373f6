"""`save`: all files of a checkpoint in one step."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import base_tensors, check_adapters, folder_of_adapter, is_merged, save_adapters
from ..core.follow import follow
from ..core.model import memories, memory_parameters, unwrap
from ..files import file_checksum, together, write_json, write_tensors, write_text
from ..version import __version__
from .contents import (
    BASE,
    CONFIG,
    FORMAT,
    WEIGHTS,
    is_read,
    is_whole,
    name_beside,
    read_config,
    shape_of,
    strays,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD, HEAD_OF_CARD = "README.md", "---\nlibrary_name: memlayers\ntags: [memory]\n---\n"


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    save_base: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the memories of `model`, and what adapters PEFT put into it, into `folder`, in one step: whoever reads it finds
    the older save or this one, whole, whenever the process ends. Several processes may save at once; the last one stands.

    Args:
        model: a model with memories, wrapped or not (`PeftModel`, DDP, `torch.compile`).
        folder: created if missing; other files in it stay. Of an older save, what this one does not have goes, unless it
            was changed since; its tokenizer stays where none is given. A README.md of yours stays too.
        save_base: also write the base model into `folder/base` (needed when it was trained).
        tokenizer: write it beside the memory, and into `folder/base` with `save_base`.

    Raises:
        NotADirectoryError: a file stands at `folder`.
        FileExistsError: a file of others would be replaced, or one in `folder/base` would be read as a part of the base.
        ValueError: the model has no memory, one that is not finite, or an adapter that is no part of it (prompts); says
            what to do.
        OSError: the disk is full, say; what was saved before is as it was.
    """
    folder, present = Path(folder), memories(model)
    if not present:
        raise ValueError("this model has no memory to save; attach one first")
    check_adapters(model)
    model = unwrap(model)
    follow(model)
    if save_base and is_merged(model):
        raise ValueError(
            "save_base: an adapter is merged into the base; take it out first, model.unmerge_adapter()"
        )
    with together(folder) as change:
        name, tensors = model.config._name_or_path, dict(memory_parameters(model))
        recorded = name_beside(folder, name)
        known = {WEIGHTS: write_tensors(change.new / WEIGHTS, tensors, {"format": "pt"})}
        of_peft, of_adapters = save_adapters(model, change.new)
        if save_base:
            save_base_model(model, change.new / BASE)
        if tokenizer is not None:
            for place in [change.new, *([change.new / BASE] if save_base else [])]:
                tokenizer.save_pretrained(place)
        keeps_base = not save_base and _is_folder(name, folder / BASE)
        of_base = {"name_or_path": BASE if save_base or keeps_base else recorded, "trained_from": recorded}
        config = {
            "format": FORMAT,
            "memlayers_version": __version__,
            "base": {**of_base, **shape_of(model)},
            "memories": {name: memory.config.model_dump() for name, memory in present.items()},
            **of_peft,
        }
        older = _older_files(folder, keeps_base)
        if _is_our_card(folder, older):
            write_text(change.new / CARD, _model_card(config, tensors))
        files = change.checksums(known={**known, **of_adapters})
        _check_foreign(folder, files, older)
        stay = {n for n in older if _stays(n, save_base, keeps_base, keeps_tokenizer=tokenizer is None)}
        gone = older.keys() - stay - files.keys()
        change.remove += [n for n in gone if is_whole(folder, n, older[n])]
        files = {**{n: older[n] for n in stay}, **files}
        if save_base:
            _check_strays(folder, {*files, *change.remove})
        write_json(change.new / CONFIG, {**config, "files": files})
    return folder


def save_base_model(model: PreTrainedModel, folder: Path) -> None:
    """The base alone, in the Hugging Face format, without memories and adapters."""
    flag = "_hf_peft_config_loaded"  # set by `model.add_adapter`; transformers then writes the adapter alone
    before = vars(model).pop(flag, None)
    try:
        model.save_pretrained(folder, state_dict=base_tensors(model))
    finally:
        if before is not None:
            setattr(model, flag, before)


def _is_folder(name: str | None, folder: Path) -> bool:
    return bool(name) and folder.is_dir() and Path(name).resolve() == folder.resolve()


def _older_files(folder: Path, keeps_base: bool) -> dict[str, str]:
    """The files of the older save in a folder, with their checksums; of one without checksums those that it must have
    written; where its memory_config.json is damaged, none."""
    try:
        config = read_config(folder, verify=False)
        older = config["files"] if "files" in config else _files_without_checksums(folder, config)
    except (OSError, ValueError):
        older = {}
    if keeps_base and not any(name.startswith(f"{BASE}/") for name in older):
        older |= {name: file_checksum(folder / name) for name in strays(folder, ())}
    return older


def _files_without_checksums(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    places = [folder_of_adapter(name) for name in config.get("adapters", [])]
    places += [BASE] if config["base"].get("name_or_path") == BASE else []
    found = [path for place in places for path in (folder / place).glob("*") if path.is_file()]
    card = folder / CARD
    if card.is_file() and card.read_bytes().startswith(HEAD_OF_CARD.encode()):
        found.append(card)
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in found}


def _is_our_card(folder: Path, older: dict[str, str]) -> bool:
    """Whether the model card may be written: a card of the user's, or one that was edited, stays."""
    card = folder / CARD
    return not os.path.lexists(card) or (card.is_file() and file_checksum(card) == older.get(CARD))


def _check_foreign(folder: Path, files: dict[str, str], older: Collection[str]) -> None:
    """Raise FileExistsError where a file would be replaced that no save of ours wrote."""
    for name, checksum in files.items():
        path = folder / name
        if name in older or name == WEIGHTS or not path.is_file() or file_checksum(path) == checksum:
            continue
        raise FileExistsError(
            f"cannot save into {folder}: {path} was not written by ml.save, and is not replaced; move it away, or name another "
            "folder"
        )


def _stays(name: str, save_base: bool, keeps_base: bool, keeps_tokenizer: bool) -> bool:
    """Whether a file of the older save stays where the new one has none of that name: what `load` does not read is of the
    tokenizer."""
    if name.startswith(f"{BASE}/") and not save_base:
        return keeps_base
    return keeps_tokenizer and not is_read(name)


def _check_strays(folder: Path, expected: Collection[str]) -> None:
    for name in strays(folder, expected):
        raise FileExistsError(
            f"cannot save the base into {folder / BASE}: {folder / name} is not of this save, and would be read as a part of "
            "it; move it away"
        )


def _model_card(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    n_parameters = sum(t.numel() for t in tensors.values())
    rows = "\n".join(f"| {name} | {block['type']} |" for name, block in config["memories"].items())
    return f"""{HEAD_OF_CARD}# Memory for {config["base"]["name_or_path"] or "a model made in memory"}

{n_parameters:,} trained memory parameters, read with memlayers {__version__}.

| memory | kind |
|---|---|
{rows}

```python
import memlayers as ml
model = ml.load("this folder or its hub id")
```
"""
