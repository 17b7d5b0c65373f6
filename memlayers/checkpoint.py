"""`save` and `load`: memory_config.json, memory.safetensors and a model card; the base is named, not copied.

out/
  memory_config.json    the memories' configs and which base they belong to
  memory.safetensors    the memories' tensors
  README.md             model card
  base/                 the base, only with save_base=True (it was trained too)
  adapters/NAME/        PEFT's adapters, where some were injected
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .adapters import base_tensors, check_adapters, is_merged, load_adapters, save_adapters
from .attach import attach
from .config import ConfigError
from .core.follow import follow
from .core.model import memories, memory_parameters, unwrap
from .core.snapshot import Snapshot
from .files import check_tensors, make_folder, write_tensors, write_text
from .kinds import parse_memory_config
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, FORMAT = "memory_config.json", "memory.safetensors", 1


def save(model: PreTrainedModel, folder: str | Path, *, save_base: bool = False) -> Path:
    """Write the memories of `model`, and what adapters PEFT put into it, into `folder`, each file whole or not at all.

    Args:
        model: a model with memories, wrapped or not (`PeftModel`, DDP, `torch.compile`).
        folder: created if missing; other files in it stay.
        save_base: also write the base model into `folder/base` (needed when it was trained).

    Raises:
        NotADirectoryError: a file stands at `folder`.
        ValueError: the model has no memory, or an adapter that is no part of it (prompts); says what to do.
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
    make_folder(folder)
    base_name = "base" if save_base else model.config._name_or_path
    if save_base:
        save_base_model(model, folder / "base")
    of_peft = save_adapters(model, folder)
    tensors = dict(memory_parameters(model))
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "memlayers": str(FORMAT)})
    config = {
        "format": FORMAT,
        "memlayers_version": __version__,
        "base": {"name_or_path": base_name, "trained_from": model.config._name_or_path, **_shape_of(model)},
        "memories": {name: memory.config.model_dump() for name, memory in present.items()},
        **of_peft,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / "README.md", _model_card(config, tensors))
    return folder


def load(
    source: str | Path,
    *,
    base: str | Path | PreTrainedModel | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """Load the base, put in the adapters of PEFT, attach the memories and fill them.

    Args:
        source: a folder that `save` wrote, or the id of such a repository on the hub.
        base: the base to use instead of the recorded one: a folder, a hub id or a loaded model.
        device: where to put the model; default: where transformers puts it.
        dtype: of the base, as in `from_pretrained`.

    Raises:
        FileNotFoundError: a file of the checkpoint, or the base it names, is not there.
        ConfigError: a field of memory_config.json is wrong; names file and field.
        ValueError: the weights are cut short, foreign, or made for another base; the base has adapters already.
    """
    from transformers import PreTrainedModel

    folder = folder_of(source)
    config = read_config(folder)
    recorded = config["base"]
    if base is not None and not isinstance(base, (str, Path)):
        base = unwrap(base)
    model = (
        base
        if isinstance(base, PreTrainedModel)
        else _load_base(folder, base or recorded["name_or_path"], dtype)
    )
    _check_shape(folder, recorded, model)
    before = Snapshot(model)
    try:
        load_adapters(model, folder, config, str(folder / CONFIG))
        for name, block in config["memories"].items():
            attach(model, parse_memory_config(block, where=f"{folder / CONFIG}: memories.{name}"), name)
        _fill(model, folder / WEIGHTS)
    except BaseException:
        before.restore()
        raise
    return model.to(device) if device is not None else model


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked contents of `memory_config.json`; raises as `load` does."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a memlayers checkpoint: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    for field in ("format", "base", "memories"):
        if not isinstance(config, dict) or field not in config:
            raise ConfigError(f"{path}: {field}: this field is required")
    for field in ("base", "memories"):
        if not isinstance(config[field], dict):
            raise ConfigError(f"{path}: {field}: expected a mapping of fields, got {config[field]!r}")
    if config["format"] != FORMAT:
        raise ConfigError(f"{path}: format: {config['format']} is not {FORMAT}, the one this version reads")
    return config


def save_base_model(model: PreTrainedModel, folder: Path) -> None:
    """The base alone, in the Hugging Face format, without memories and adapters."""
    flag = "_hf_peft_config_loaded"  # set by `model.add_adapter`; transformers then writes the adapter alone
    before = vars(model).pop(flag, None)
    try:
        model.save_pretrained(folder, state_dict=base_tensors(model))
    finally:
        if before is not None:
            setattr(model, flag, before)


def folder_of(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or the local copy of the hub repository it names.

    Raises:
        FileNotFoundError: neither is there.
        NotADirectoryError: `source` is a file.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise NotADirectoryError(f"{source} is a file; load takes the folder that save wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no checkpoint at {source!r}: not a folder here, and the hub answered {type(error).__name__}"
        ) from None


def _load_base(folder: Path, name: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if not name:
        raise FileNotFoundError(
            f"{folder / CONFIG} names no base (it was made in memory); pass base= to load"
        )
    beside = folder / str(name)
    try:
        return AutoModelForCausalLM.from_pretrained(beside if beside.is_dir() else name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the base model {str(name)!r} that {folder / CONFIG} names cannot be loaded; pass base= with its "
            f"folder or hub id ({str(error).splitlines()[0]})"
        ) from None


def _shape_of(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {field: getattr(config, field, None) for field in fields}


def _check_shape(folder: Path, recorded: dict[str, Any], model: PreTrainedModel) -> None:
    for field, value in _shape_of(model).items():
        if field in recorded and recorded[field] != value:
            raise ValueError(
                f"{folder / CONFIG}: made for a base with {field} {recorded[field]}, this one has {value}; "
                "pass the base it was trained on"
            )


def _fill(model: PreTrainedModel, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the checkpoint is not whole")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or not a safetensors file ({error})") from None
    expected = dict(memory_parameters(model))
    check_tensors(path, expected, tensors, "does not belong to these memories", CONFIG)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _model_card(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    n_parameters = sum(t.numel() for t in tensors.values())
    rows = "\n".join(f"| {name} | {block['type']} |" for name, block in config["memories"].items())
    return f"""---
library_name: memlayers
tags: [memory]
---
# Memory for {config["base"]["name_or_path"] or "a model made in memory"}

{n_parameters:,} trained memory parameters, read with memlayers {__version__}.

| memory | kind |
|---|---|
{rows}

```python
import memlayers as ml
model = ml.load("this folder or its hub id")
```
"""
