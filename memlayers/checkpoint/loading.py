"""`load`: the base, the adapters of PEFT and the memories of a folder that `save` wrote, put together again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import load_adapters
from ..attach import attach
from ..config import ConfigError
from ..core.model import memory_parameters, unwrap
from ..core.snapshot import Snapshot
from ..files import check_tensors, read_tensors, reading
from ..kinds import parse_memory_config
from ..loading import first_line, load_causal_lm
from .contents import BASE, CONFIG, WEIGHTS, checking, has_base, place_of, read_config, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    source: str | Path,
    *,
    base: str | Path | PreTrainedModel | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    verify: bool = True,
) -> PreTrainedModel:
    """Load the base, put in the adapters of PEFT, attach the memories and fill them.

    A save that was interrupted after it was decided is brought to its end first. What is read is compared with the
    checksums that `save` wrote, before a memory is made.

    Args:
        source: a folder that `save` wrote, or the id of such a repository on the hub.
        base: the base to use instead of the recorded one: a folder, a hub id or a loaded model.
        device: where to put the model; default: where transformers puts it.
        dtype: of the base, as in `from_pretrained`.
        verify: compare the checksums; False takes what is there: files that were changed by hand, or those of earlier
            versions.

    Raises:
        FileNotFoundError: a file of the checkpoint, or the base it names, is not there; or the base needs code of its own,
            or is a pickle.
        ConfigError: a field of memory_config.json is wrong; names file and field.
        ValueError: a file is cut short, not as it was written, or of another checkpoint; the memory was made for another
            base; the base has adapters already.
        OSError: an interrupted save cannot be brought to its end, because the folder cannot be written.
    """
    folder = folder_of(source)
    with reading(folder):
        model = _load(folder, base, dtype, verify)
    return model.to(device) if device is not None else model


def _load(folder: Path, base, dtype: torch.dtype | str, verify: bool) -> PreTrainedModel:
    config = read_config(folder, verify=verify)
    beside = base is None and has_base(folder, config)
    with checking(folder, config, with_base=beside) if verify else nullcontext():
        return _put_together(folder, config, base, beside, dtype, verify)


def _put_together(
    folder: Path, config: dict[str, Any], base, beside: bool, dtype: torch.dtype | str, verify: bool
) -> PreTrainedModel:
    """The base, the adapters and the memories. `beside`: whether the base is the one in the folder."""
    from transformers import PreTrainedModel

    tensors = _tensors_of(folder, config, verify)
    if base is not None and not isinstance(base, (str, Path)):
        base = unwrap(base)
    if isinstance(base, PreTrainedModel):
        model = base
    else:
        named = base or place_of(folder, config["base"].get("name_or_path"))
        model = _load_base(folder, folder / BASE if beside else named, dtype)
    _check_shape(folder, config["base"], model)
    before = Snapshot(model)
    try:
        load_adapters(model, folder, config, str(folder / CONFIG), verify=verify)
        for name, block in config["memories"].items():
            _attach(model, name, block, f"{folder / CONFIG}: memories.{name}")
        _fill(model, tensors, folder / WEIGHTS)
    except BaseException:
        before.restore()
        raise
    return model


def _tensors_of(folder: Path, config: dict[str, Any], verify: bool) -> dict[str, torch.Tensor]:
    """The memories' tensors, as views of the file."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the checkpoint is not whole")
    return read_tensors(path, verify=verify, recorded=config.get("files", {}).get(WEIGHTS))[0]


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


def _load_base(folder: Path, source: str | Path | None, dtype: torch.dtype | str) -> PreTrainedModel:
    if not source:
        raise FileNotFoundError(
            f"{folder / CONFIG} names no base (it was made in memory); pass base= to load"
        )
    try:
        return load_causal_lm(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the base model {str(source)!r} that {folder / CONFIG} names cannot be loaded; pass base= with its "
            f"folder or hub id ({first_line(error)})"
        ) from None


def _check_shape(folder: Path, recorded: dict[str, Any], model: PreTrainedModel) -> None:
    for field, value in shape_of(model).items():
        if field in recorded and recorded[field] != value:
            raise ValueError(
                f"{folder / CONFIG}: made for a base with {field} {str(recorded[field])[:80]}, this one has {value}; "
                "pass the base it was trained on"
            )


def _attach(model: PreTrainedModel, name: str, block: Any, where: str) -> None:
    config = parse_memory_config(block, where=where)
    try:
        attach(model, config, name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _fill(model: PreTrainedModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = dict(memory_parameters(model))
    check_tensors(path, expected, tensors, "does not belong to these memories", CONFIG)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
