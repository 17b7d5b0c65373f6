"""Adapters that PEFT put into a model: written beside its memories, each in a folder of its own, and put in again."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .config import ConfigError
from .core.model import ROOT
from .files import check_tensors, write_tensors, write_text

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


def save_adapters(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write all adapters into `folder / "adapters"`, in PEFT's own format.

    Returns:
        What the config of the checkpoint says of them.
    """
    for name, config in adapters(model).items():
        write_tensors(folder / FOLDER / _folder(name) / WEIGHTS, _tensors(model, name), {"format": "pt"})
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            text = (Path(scratch) / CONFIG).read_text(encoding="utf-8")
        write_text(folder / FOLDER / _folder(name) / CONFIG, text)
    return {"adapters": list(adapters(model)), "active_adapters": active_adapters(model)}


def load_adapters(model: nn.Module, folder: Path, config: dict[str, Any], where: str) -> None:
    """Put the adapters into `model` that `config` names, and make those active that were.

    Args:
        folder: of the checkpoint.
        config: the contents of its `memory_config.json`.
        where: names that file in errors.

    Raises:
        FileNotFoundError, ConfigError, ValueError: as `memlayers.load`.
    """
    if "adapters" in config:
        names, active = config["adapters"], config.get("active_adapters", config["adapters"])
        folders = [folder / FOLDER / _folder(str(name)) for name in names]
    else:
        names = active = [OLD_FOLDER] if (folder / OLD_FOLDER).is_dir() else []
        folders = [folder / OLD_FOLDER]
    for field, value in (("adapters", names), ("active_adapters", active)):
        if not isinstance(value, list) or not all(isinstance(n, str) and n in names for n in value):
            raise ConfigError(f"{where}: {field}: expected a list of names of adapters, got {value!r}")
    if names and adapters(model):
        raise ValueError(
            f"{folder} has adapters of its own, {names}, and the base that was given has {list(adapters(model))}; give it "
            "without, model.unload()"
        )
    tensors = {name: _put_in(model, place, name) for name, place in zip(names, folders)}
    for name, place in zip(names, folders):  # only now: one that stands around another changes its names
        _fill(model, place, name, tensors[name])
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


def _put_in(model: nn.Module, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Put an adapter into the model as its config says; the tensors that belong into it."""
    from peft import PeftConfig, inject_adapter_in_model

    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; the checkpoint is not whole")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is cut short or not a safetensors file ({error})") from None
    try:
        config = PeftConfig.from_pretrained(str(folder))
        inject_adapter_in_model(config, model, adapter_name=name)
    except (KeyError, TypeError, ValueError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder / CONFIG}: PEFT cannot put this adapter into the base ({told})") from None
    return tensors


def _fill(model: nn.Module, folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    expected = _tensors(model, name)
    check_tensors(folder / WEIGHTS, expected, tensors, "does not belong to this adapter's config", CONFIG)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def _activate(model: nn.Module, active: list[str]) -> None:
    from peft.tuners.tuners_utils import set_adapter

    set_adapter(model, active or list(adapters(model)))
    for module in _layers(model):
        if not active:
            module.enable_adapters(False)


def _tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors. PEFT takes those for its own too that are called as its are, in a memory."""
    from peft import get_peft_model_state_dict

    state = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{ROOT}.")}
    return get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put into a model."""
    if not adapters(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def _folder(name: str) -> str:
    return quote(name, safe="")
