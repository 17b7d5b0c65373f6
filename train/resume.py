"""Checkpoints that are whole or not there, and that bring a run back bit for bit.

A checkpoint is a folder `step-00000100` of safetensors and JSON. It is written under a temporary name, every
file is flushed to disk, a file `COMPLETE` with the size of every other file is put in, and only then is the folder
renamed. Whatever a kill leaves behind is a temporary folder, which the next run deletes. Older checkpoints go
after the new one stands. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

COMPLETE = "COMPLETE"
TEMPORARY = ".tmp-"


@dataclass
class Progress:
    """Where a run stands; everything here is in the checkpoint.

    Attributes:
        step: optimizer steps taken.
        stage: index of the curriculum's stage.
        recent: accuracies at the current stage, newest last, at most the curriculum's window.
        unlogged: what was measured since the last line of the log, a list of numbers for each step.
        tokens: tokens read, padding included, by all processes.
        log_offset: bytes of `log.jsonl` that belong to these steps.
    """

    step: int = 0
    stage: int = 0
    recent: list[float] = field(default_factory=list)
    unlogged: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    log_offset: int = 0


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LRScheduler],
    config: dict[str, Any],
    keep: int,
    usage: dict[str, torch.Tensor],
    rank: int = 0,
    barrier=lambda: None,
) -> Path:
    """Write `folder/step-…` whole or not at all, then delete all but the newest `keep`.

    Every process calls it: each writes its own random states and counts, process 0 all the rest.

    Args:
        folder: where checkpoints lie.
        model: its parameters that learn, and the buffers that `state_dict` has, are written.
        config: the run's config as plain values, to be compared on resume.
        usage: this process's counts since the last line of the log.
        barrier: waits for all processes.
    """
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    if rank == 0:
        clean(folder)
        temporary.mkdir(parents=True)
    barrier()
    tensors, numbers = random_state()
    _write_tensors(temporary / f"random-{rank}.safetensors", tensors)
    _write_json(temporary / f"random-{rank}.json", numbers)
    _write_tensors(temporary / f"usage-{rank}.safetensors", usage)
    barrier()
    if rank == 0:
        _write_tensors(temporary / "model.safetensors", trained_tensors(model))
        tensors, numbers = optimizer_state(model, optimizers)
        _write_tensors(temporary / "optimizer.safetensors", tensors)
        state = {"progress": asdict(progress), "optimizers": numbers, "config": config}
        state["schedules"] = [schedule.state_dict() for schedule in schedules]
        _write_json(temporary / "state.json", state)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        _write_json(temporary / COMPLETE, sizes)
        _sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync_folder(folder)
        for old in complete_checkpoints(folder)[:-keep]:
            (old / COMPLETE).unlink()
            shutil.rmtree(old)
    barrier()
    return final


def clean(folder: Path) -> None:
    """Delete what killed runs left half-written."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and (path.name.startswith(TEMPORARY) or not is_complete(path)):
                shutil.rmtree(path)


def is_complete(checkpoint: Path) -> bool:
    """Whether `COMPLETE` is there and every file has the size it names."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith("step-") and is_complete(path))


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LRScheduler],
    rank: int = 0,
) -> Progress:
    """Put everything back as it was when `checkpoint` was written, random states last.

    Raises:
        ValueError: a file is damaged, or belongs to another model or number of processes; names the file.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    restore_tensors(model, _read_tensors(checkpoint / "model.safetensors"), checkpoint / "model.safetensors")
    tensors = _read_tensors(checkpoint / "optimizer.safetensors")
    restore_optimizers(model, optimizers, tensors, state["optimizers"], checkpoint / "optimizer.safetensors")
    for schedule, saved in zip(schedules, state["schedules"], strict=True):
        schedule.load_state_dict(saved)
    own = checkpoint / f"random-{rank}.safetensors"
    if not own.is_file():
        raise ValueError(f"{checkpoint} has no {own.name}: it was written by fewer processes than run now")
    restore_random_state(_read_tensors(own), json.loads(own.with_suffix(".json").read_text()))
    return Progress(**state["progress"])


def saved_usage(checkpoint: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """The counts of this process that were in no line of the log yet."""
    return _read_tensors(checkpoint / f"usage-{rank}.safetensors")


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """The config of the run that wrote `checkpoint`."""
    return json.loads((checkpoint / "state.json").read_text())["config"]


# The parts of a checkpoint: tensors by name, and numbers for JSON.


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that learn, shared ones once, and all persistent buffers."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict(keep_vars=True)
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    return tensors


def restore_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copy `tensors` into the model in place."""
    wanted = trained_tensors(model)
    if wanted.keys() != tensors.keys():
        differ = ", ".join(sorted(wanted.keys() ^ tensors.keys())[:5])
        raise ValueError(f"{source} belongs to another model or train_what; tensors that differ: {differ}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            )
        tensor.data.copy_(tensors[name])


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[dict, dict]:
    """State tensors as `exp_avg/name of parameter`; other numbers of the states and of the groups for JSON."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors, numbers = {}, {}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                kept = tensors if isinstance(value, torch.Tensor) else numbers
                kept[f"{key}/{names[id(parameter)]}"] = value
    skip = {"params", "parameter_names"}
    groups = [{k: v for k, v in group.items() if k not in skip} for group in _groups(optimizers)]
    return tensors, {"state": numbers, "groups": groups}


def restore_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict, numbers: dict, source: Path
) -> None:
    """Put back what `optimizer_state` took, on the device of each parameter."""
    groups = _groups(optimizers)
    if len(numbers["groups"]) != len(groups):
        raise ValueError(f"{source} has {len(numbers['groups'])} parameter groups, not {len(groups)}")
    parameters = dict(model.named_parameters())
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.state.clear()
    for label, value in [*tensors.items(), *numbers["state"].items()]:
        key, name = label.split("/", 1)
        parameter = parameters.get(name)
        if id(parameter) not in owners:
            raise ValueError(f"{source} has state for {name}, which does not learn in this model")
        optimizer = owners[id(parameter)]
        if isinstance(value, torch.Tensor):
            on_host = key == "step" and not (
                optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            )
            value = value.to("cpu" if on_host else parameter.device)
        optimizer.state[parameter][key] = value
    for group, saved in zip(groups, numbers["groups"]):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def random_state() -> tuple[dict, dict]:
    """States of the generators of python, numpy, torch and every CUDA device of this process."""
    version, python, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors.update({f"cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    numbers = {"python": [version, list(python), gauss], "numpy": [kind, place, has_gauss, cached]}
    return tensors, numbers


def restore_random_state(tensors: dict, numbers: dict) -> None:
    """Put back what `random_state` took."""
    version, python, gauss = numbers["python"]
    random.setstate((version, tuple(python), gauss))
    kind, place, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda-{i}"] for i in range(len(tensors)) if f"cuda-{i}" in tensors]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    _sync_file(path)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))
    _sync_file(path)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); delete its folder to resume from the one before"
        ) from None


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
