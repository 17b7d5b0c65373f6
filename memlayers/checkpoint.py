"""`save` and `load`: memory_config.json, memory.safetensors and a model card; the base is named, not copied.

out/
  memory_config.json    the memories' configs and which base they belong to
  memory.safetensors    the memories' tensors
  README.md             model card
  base/                 the base, only with save_base=True (it was trained too)
  lora/                 a PEFT adapter, where one was injected
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .attach import attach, detach
from .config import ConfigError
from .core.model import memories, memory_parameters, unwrap
from .files import make_folder, write_tensors, write_text
from .kinds import parse_memory_config
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, FORMAT = "memory_config.json", "memory.safetensors", 1


def save(model: PreTrainedModel, folder: str | Path, *, save_base: bool = False) -> Path:
    """Write the memories of `model` into `folder`, each file whole or not at all.

    Args:
        model: a model with memories.
        folder: created if missing; other files in it stay.
        save_base: also write the base model into `folder/base` (needed when it was trained).

    Raises:
        NotADirectoryError: a file stands at `folder`.
        ValueError: the model has no memory.
    """
    model = unwrap(model)
    folder, present = Path(folder), memories(model)
    if not present:
        raise ValueError("this model has no memory to save; attach one first")
    make_folder(folder)
    base_name = "base" if save_base else model.config._name_or_path
    if save_base:
        save_base_model(model, folder / "base")
    if _injected_lora(model):
        _save_lora(model, folder / "lora")
    tensors = dict(memory_parameters(model))
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "memlayers": str(FORMAT)})
    config = {
        "format": FORMAT,
        "memlayers_version": _version(),
        "base": {"name_or_path": base_name, "trained_from": model.config._name_or_path, **_shape_of(model)},
        "memories": {name: memory.config.model_dump() for name, memory in present.items()},
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
    """Load the base, attach the memories and fill them.

    Args:
        source: a folder that `save` wrote, or the id of such a repository on the hub.
        base: the base to use instead of the recorded one: a folder, a hub id or a loaded model.
        device: where to put the model; default: where transformers puts it.
        dtype: of the base, as in `from_pretrained`.

    Raises:
        FileNotFoundError: a file of the checkpoint, or the base it names, is not there.
        ConfigError: a field of memory_config.json is wrong; names file and field.
        ValueError: the weights are cut short, foreign, or made for another base.
    """
    from transformers import PreTrainedModel

    folder = folder_of(source)
    config = read_config(folder)
    recorded = config["base"]
    model = (
        base
        if isinstance(base, PreTrainedModel)
        else _load_base(folder, base or recorded["name_or_path"], dtype)
    )
    _check_shape(folder, recorded, model)
    if (folder / "lora").is_dir():
        _load_lora(model, folder / "lora")
    attached = []
    try:
        for name, block in config["memories"].items():
            attach(model, parse_memory_config(block, where=f"{folder / CONFIG}: memories.{name}"), name)
            attached.append(name)
        _fill(model, folder / WEIGHTS)
    except Exception:
        for name in attached:
            detach(model, name)
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
    """The base alone, in the Hugging Face format, without memories or an injected adapter."""
    skip = {name for name, _ in memory_parameters(model)}
    state = {n: t for n, t in model.state_dict().items() if n not in skip and ".lora_" not in n}
    state = {n.replace(".base_layer.", "."): t for n, t in state.items()}
    model.save_pretrained(folder, state_dict=state)


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
    for name in expected.keys() ^ tensors.keys():
        told = "is missing" if name in expected else "does not belong to these memories"
        raise ValueError(f"{path}: tensor {name!r} {told}; the file belongs to another checkpoint")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, {CONFIG} asks for "
                f"{tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _injected_lora(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "peft_config", None))


def _save_lora(model: PreTrainedModel, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    (name, lora), *_ = model.peft_config.items()
    make_folder(folder)
    write_tensors(
        folder / "adapter_model.safetensors", get_peft_model_state_dict(model, adapter_name=name), {}
    )
    lora.save_pretrained(folder)


def _load_lora(model: PreTrainedModel, folder: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    inject_adapter_in_model(LoraConfig.from_pretrained(folder), model, adapter_name="lora")
    result = set_peft_model_state_dict(
        model, load_file(folder / "adapter_model.safetensors"), adapter_name="lora"
    )
    if result.unexpected_keys:
        raise ValueError(
            f"{folder}: tensor {result.unexpected_keys[0]!r} does not belong to this adapter's config"
        )


def _version() -> str:
    return __version__


def _model_card(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    n_parameters = sum(t.numel() for t in tensors.values())
    rows = "\n".join(f"| {name} | {block['type']} |" for name, block in config["memories"].items())
    return f"""---
library_name: memlayers
tags: [memory]
---
# Memory for {config["base"]["name_or_path"] or "a model made in memory"}

{n_parameters:,} trained memory parameters, read with memlayers {_version()}.

| memory | kind |
|---|---|
{rows}

```python
import memlayers as ml
model = ml.load("this folder or its hub id")
```
"""
