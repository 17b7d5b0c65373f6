"""What is in a checkpoint: everything that a run needs to go on bit for bit. Safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from memlayers.files import (
    DamagedFile,
    check_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
RANDOM, USAGE = "random-{}", "usage-{}"
"""Files of each process, by its number."""
METADATA = {"format": "pt"}


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
        log_checksum: of these bytes; None in checkpoints of earlier versions.
    """

    step: int = 0
    stage: int = 0
    recent: list[float] = field(default_factory=list)
    unlogged: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    log_offset: int = 0
    log_checksum: str | None = None


@dataclass
class Parts:
    """What learns and how: that which a checkpoint is taken of, and put back into."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedules: list[torch.optim.lr_scheduler.LRScheduler]


def write_own(folder: Path, usage: dict[str, torch.Tensor], rank: int) -> None:
    """Write what each process has of its own: random states, and the counts since the last line of the log."""
    tensors, numbers = random_state()
    write_tensors(folder / f"{RANDOM.format(rank)}.safetensors", tensors, METADATA)
    write_json(folder / f"{RANDOM.format(rank)}.json", numbers)
    write_tensors(folder / f"{USAGE.format(rank)}.safetensors", usage, METADATA)


def write_shared(folder: Path, parts: Parts, progress: Progress, config: dict[str, Any]) -> None:
    """Write what is the same on all processes.

    Args:
        config: the run's config as plain values, to be compared on resume.
    """
    write_tensors(folder / MODEL, trained_tensors(parts.model), METADATA)
    tensors, numbers = optimizer_state(parts.model, parts.optimizers)
    write_tensors(folder / OPTIMIZER, tensors, METADATA)
    schedules = [schedule.state_dict() for schedule in parts.schedules]
    state = {"progress": asdict(progress), "optimizers": numbers, "config": config, "schedules": schedules}
    write_text(folder / STATE, json.dumps(state))  # its checksum is with those of all files, in COMPLETE


def read_state(checkpoint: Path, verify: bool = True) -> tuple[Progress, dict[str, Any]]:
    """Where the run stood, and all of `state.json`.

    Raises:
        DamagedFile: it is not as it was written, or a field is of another type; names the file.
    """
    path = checkpoint / STATE
    state = read_json(path, verify=verify, required=False)
    with _naming(path):
        progress = _progress(state["progress"])
        for name, kind in (("config", dict), ("optimizers", dict), ("schedules", list)):
            if not isinstance(state[name], kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {str(state[name])[:80]!r}")
    return progress, state


def put_back(
    checkpoint: Path, parts: Parts, rank: int = 0, verify: bool = True
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Put everything back as it was when `checkpoint` was written, random states last.

    Returns:
        Where the run stood, and the counts of this process that were in no line of the log yet.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedFile, ValueError: a file is damaged, or belongs to another model or number of processes; names the file.
    """
    progress, state = read_state(checkpoint, verify)
    own = checkpoint / RANDOM.format(rank)
    random_tensors, _ = read_tensors(own.with_suffix(".safetensors"), verify=verify)
    random_numbers = read_json(own.with_suffix(".json"), verify=verify)
    usage, _ = read_tensors(checkpoint / f"{USAGE.format(rank)}.safetensors", verify=verify)
    weights, _ = read_tensors(checkpoint / MODEL, verify=verify)
    moments, _ = read_tensors(checkpoint / OPTIMIZER, verify=verify)

    restore_tensors(parts.model, weights, checkpoint / MODEL)
    with _naming(checkpoint / OPTIMIZER):
        restore_optimizers(parts.model, parts.optimizers, moments, state["optimizers"])
    with _naming(checkpoint / STATE):
        for schedule, saved in zip(parts.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
    with _naming(own.with_suffix(".json")):
        restore_random_state(random_tensors, random_numbers)
    return progress, usage


def _progress(data: dict[str, Any]) -> Progress:
    """Progress of plain values; raises ValueError or TypeError where one is of another type or below 0."""
    progress = Progress(**data)
    for name in ("step", "stage", "tokens", "log_offset"):
        if type(data[name]) is not int or data[name] < 0:
            raise ValueError(f"progress.{name}: needs a whole number from 0, not {str(data[name])[:80]!r}")
    numbers = [*progress.recent, *(number for line in progress.unlogged for number in line)]
    if not all(type(number) is float for number in numbers):
        raise ValueError("progress: recent and unlogged need lists of numbers")
    return progress


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have what cannot be understood in a file raise a DamagedFile that names it."""
    try:
        yield
    except DamagedFile:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise DamagedFile(f"{path} is not what a checkpoint of this run holds ({error})") from error


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that learn, shared ones once, and all persistent buffers."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict(keep_vars=True)
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    return tensors


def restore_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copy `tensors` into the model in place; raises ValueError that names `source` unless they are those of it."""
    wanted = trained_tensors(model)
    check_tensors(source, wanted, tensors, "is none that learns in this model", "this run's config")
    for name, tensor in wanted.items():
        if tensor.dtype != tensors[name].dtype:
            raise DamagedFile(f"{source}: tensor {name!r} is {tensors[name].dtype}, not {tensor.dtype}")
    for name, tensor in wanted.items():
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
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict, numbers: dict
) -> None:
    """Put back what `optimizer_state` took, on the device of each parameter."""
    groups = _groups(optimizers)
    if len(numbers["groups"]) != len(groups):
        raise ValueError(f"{len(numbers['groups'])} parameter groups, not {len(groups)}")
    parameters = dict(model.named_parameters())
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.state.clear()
    for label, value in [*tensors.items(), *numbers["state"].items()]:
        key, name = label.split("/", 1)
        parameter = parameters.get(name)
        if id(parameter) not in owners:
            raise ValueError(f"state for {name}, which does not learn in this model")
        optimizer = owners[id(parameter)]
        if isinstance(value, torch.Tensor):
            on_host = key == "step" and not (
                optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            )
            # A tensor of its own: what was read is a view of the file.
            value = value.to("cpu" if on_host else parameter.device, copy=True)
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
