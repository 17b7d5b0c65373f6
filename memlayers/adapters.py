"""Adapters that PEFT put into a model: written beside its memories, each in a folder of its own, and put in again."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from .config import ConfigError
from .core.model import PEFT_PREFIX, ROOT
from .errors import says_no_memory
from .files import check_tensors, file_checksum, read_tensors, write_tensors, write_text
from .loading import first_line

FOLDER, CONFIG, WEIGHTS = "adapters", "adapter_config.json", "adapter_model.safetensors"
OLD_FOLDER = "lora"
"""Where the one adapter of a checkpoint stood that knows nothing of `adapters`; it was loaded under this name."""


def adapters(model: nn.Module) -> dict[str, Any]:
    """The adapters in a Hugging Face model: names to the configs of PEFT."""
    return dict(getattr(model, "peft_config", None) or {})


def active_adapters(model: nn.Module) -> list[str]:
    """Those that take part in a call; none where they are disabled."""
    active: dict[str, None] = {}
    for module in _layers(model):
        if not module.disable_adapters:
            active.update(dict.fromkeys(module.active_adapters))
    return [name for name in adapters(model) if name in active]


def is_merged(model: nn.Module) -> bool:
    """Whether the base's tensors hold an adapter that is still there."""
    return any(getattr(module, "merged", False) for module in _layers(model))


def check_adapters(model: nn.Module) -> None:
    """Raise ValueError for an adapter that cannot be saved along with a memory; says what to do.

    Args:
        model: as the caller has it, wrapped or not.
    """
    if "peft" not in sys.modules:
        return
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    for module in model.modules():
        for name, config in adapters(module).items():
            told = f"adapter {name!r} ({config.peft_type.value}) "
            if config.is_prompt_learning:
                raise ValueError(
                    told
                    + "is no part of the model but stands before its text, so that ml.save cannot keep it: save it with "
                    "model.save_pretrained(folder), and the memory with ml.save(model.get_base_model(), folder)"
                )
            tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
            if tuner is None or config.is_adaption_prompt or getattr(tuner, "uses_shared_state", False):
                raise ValueError(
                    told
                    + "is of a type that PEFT puts into a model only through get_peft_model, so that ml.load could not: "
                    "take it out with unload() and save it by itself, or merge it with merge_and_unload() and "
                    "ml.save(model, folder, save_base=True)"
                )


def save_adapters(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Write all adapters into `folder / "adapters"`, in PEFT's own format.

    Returns:
        What the config of the checkpoint says of them, and the files with their checksums.
    """
    files = {}
    for name, config in adapters(model).items():
        place = folder_of_adapter(name)
        files[f"{place}/{WEIGHTS}"] = write_tensors(
            folder / place / WEIGHTS, _tensors(model, name), {"format": "pt"}
        )
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            text = (Path(scratch) / CONFIG).read_text(encoding="utf-8")
        write_text(folder / place / CONFIG, text)
        files[f"{place}/{CONFIG}"] = file_checksum(folder / place / CONFIG)
    return {"adapters": list(adapters(model)), "active_adapters": active_adapters(model)}, files


def load_adapters(
    model: nn.Module, folder: Path, config: dict[str, Any], where: str, *, verify: bool = True
) -> None:
    """Put the adapters into `model` that `config` names, and make those active that were.

    Args:
        folder: of the checkpoint.
        config: the contents of its `memory_config.json`.
        where: names that file in errors.
        verify: compare the checksums of tensors; those of the configs are the caller's to compare.

    Raises:
        FileNotFoundError, ConfigError, ValueError: as `memlayers.load`.
    """
    if "adapters" in config:
        names, active = config["adapters"], config.get("active_adapters", config["adapters"])
        places = [folder_of_adapter(str(name)) for name in names]
    else:
        names = active = [OLD_FOLDER] if (folder / OLD_FOLDER).is_dir() else []
        places = [OLD_FOLDER]
    for field, value in (("adapters", names), ("active_adapters", active)):
        if not isinstance(value, list) or not all(_can_name(n) and n in names for n in value):
            raise ConfigError(
                f"{where}: {field}: expected a list of names of adapters, got {str(value)[:80]!r}"
            )
    if names and adapters(model):
        raise ValueError(
            f"{folder} has adapters of its own, {names}, and the base that was given has {list(adapters(model))}; give it "
            "without, model.unload()"
        )
    tensors = {}
    for name, place in zip(names, places):
        tensors[name] = _read(folder / place, config.get("files", {}).get(f"{place}/{WEIGHTS}"), verify)
        _put_in(model, folder / place, name)
    for name, place in zip(names, places):  # only now: one that stands around another changes its names
        _fill(model, folder / place, name, tensors[name])
    if names:
        _activate(model, active)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the base alone, by the names that they have without memories and adapters."""
    kept = {}
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        of = {
            ModulesToSaveWrapper: "original_module",
            TrainableTokensWrapper: "token_adapter",
            BaseTunerLayer: "base_layer",
        }
        for name, module in model.named_modules():
            for kind, part in of.items():
                if isinstance(module, kind):
                    kept[name] = part
    tensors = {}
    for name, tensor in model.state_dict().items():
        own = _base_name(name, kept)
        if own is not None and not own.startswith(f"{ROOT}."):
            tensors[own] = tensor
    return tensors


def _base_name(name: str, kept: dict[str, str]) -> str | None:
    """The name of a tensor without adapters, or None where it belongs to one. `kept`: the names of what stands around a
    module of the base, to the name of that module in it."""
    parts, own = name.split("."), []
    for i, part in enumerate(parts):
        inner = kept.get(".".join(parts[:i]))
        if inner is None:
            own.append(part)
        elif inner != part:
            return None
    return ".".join(own)


def _read(folder: Path, recorded: str | None, verify: bool) -> dict[str, torch.Tensor]:
    """An adapter's tensors, as views of its file."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; the checkpoint is not whole")
    tensors, _ = read_tensors(folder / WEIGHTS, verify=verify, recorded=recorded)
    if not any(key.startswith(PEFT_PREFIX) for key in tensors):  # of an earlier version
        return {PEFT_PREFIX + key: tensor for key, tensor in tensors.items()}
    return tensors


def _put_in(model: nn.Module, folder: Path, name: str) -> None:
    """Put an adapter into the model as its config says."""
    from peft import PeftConfig, inject_adapter_in_model

    try:
        config = PeftConfig.from_pretrained(str(folder))
        inject_adapter_in_model(config, model, adapter_name=name)
    except Exception as error:  # PEFT does not look at what a config holds; anything may come of it
        if says_no_memory(error):
            raise
        raise ValueError(
            f"{folder / CONFIG}: PEFT cannot put this adapter into the base ({first_line(error)})"
        ) from None


def _fill(model: nn.Module, folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    expected = _tensors(model, name)
    check_tensors(folder / WEIGHTS, expected, tensors, "does not belong to this adapter's config", CONFIG)
    plain = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    set_peft_model_state_dict(model, plain, adapter_name=name)


def _activate(model: nn.Module, active: list[str]) -> None:
    from peft.tuners.tuners_utils import set_adapter

    set_adapter(model, active or list(adapters(model)))
    for module in _layers(model):
        if not active:
            module.enable_adapters(False)


def _tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors, by their names in a file. PEFT takes those for its own too that are called as its are, in a memory."""
    from peft import get_peft_model_state_dict

    state = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{ROOT}.")}
    own = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
    return {PEFT_PREFIX + key: tensor for key, tensor in own.items()}


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put into a model."""
    if not adapters(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def folder_of_adapter(name: str) -> str:
    """The folder of an adapter, by its name in the checkpoint."""
    return f"{FOLDER}/{quote(name, safe='')}"


def _can_name(name: Any) -> bool:
    """Whether an adapter can have this name; with a dot it could name another folder, and PyTorch takes none."""
    return isinstance(name, str) and bool(name) and "." not in name
