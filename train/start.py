"""Before the first step: the accelerator, checks, and an output folder that is fresh or fits what it goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from memlayers.checkpoint import save_base_model
from memlayers.config import ConfigError, validate
from memlayers.tasks import MqarTask

from .config import TrainConfig
from .data import TaskSource
from .output import Output
from .snapshot import read_state
from .sources import Source

FREE_ON_RESUME = {
    "max_steps",
    "stop_at",
    "checkpoint_every",
    "keep_checkpoints",
    "output_dir",
    "overwrite",
    "trackers",
}
"""Fields that a resumed run may change."""


def start_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """The accelerator, checked against the config, with its trackers started.

    Raises:
        ConfigError: another number of processes than configured, or a tracker that is not installed.
    """
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        if "logging capability" not in str(error):
            raise
        raise ConfigError(f"trackers: accelerate does not know one of {config.trackers} ({error})") from None
    if accelerator.num_processes != config.num_processes:
        raise ConfigError(
            f"num_processes: the config says {config.num_processes}, {accelerator.num_processes} started. On a CPU "
            "start several with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train/run.py ..., because "
            "`accelerate launch --cpu --num_processes N` starts one"
        )
    missing = set(config.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    if missing:
        raise ConfigError(f"trackers: {', '.join(sorted(missing))} cannot be used here; install it first")
    return accelerator


def take_output(
    output: Output, config: TrainConfig, accelerator: Accelerator, start: Callable[[Path], None] | None
) -> Path | None:
    """Make `output_dir` ready, which this process must hold; returns the checkpoint to resume from, if any.

    Args:
        start: writes the base of a model with random weights into a folder; None: there is none.

    Raises:
        ConfigError: the checkpoint was written with another config.
        As `Output.find_checkpoint` and `Output.begin`.
    """
    now, found = config.model_dump(mode="json"), None
    if output.resume:
        found = output.find_checkpoint(accelerator.print)
    if found is not None:
        _, state = read_state(found, output.verify)
        compare_configs(with_defaults(state["config"]), now, found)
    output.begin(found is not None, now, start)
    return found


def check_embeddings(model, source: Source) -> None:
    """Raise ConfigError when a task draws token ids that the model has no embedding for."""
    task = source.task if isinstance(source, TaskSource) else None
    if isinstance(task, MqarTask):
        task.check_embeddings(model.get_input_embeddings().weight.shape[0], where="data.task")


def write_start(model, tokenizer, folder: Path) -> None:
    """Write the base of a model with random weights before it learns: evaluation compares with it."""
    save_base_model(model, folder)
    tokenizer.save_pretrained(folder)


def with_defaults(saved: dict) -> dict:
    """A saved config in which fields that are younger than it have their defaults, which is how its run went."""
    try:
        return validate(TrainConfig, saved).model_dump(mode="json")
    except ConfigError:
        return saved


def compare_configs(saved: dict, now: dict, checkpoint: Path) -> None:
    """Raise ConfigError when a run would go on with another config than it began with; names the fields."""
    saved, now = flat(saved), flat(now)
    free = FREE_ON_RESUME if now["schedule.type"] == "constant" else FREE_ON_RESUME - {"max_steps"}
    differ = [
        k
        for k in sorted(saved.keys() | now.keys())
        if k.split(".")[0] not in free and saved.get(k) != now.get(k)
    ]
    if differ:
        told = "; ".join(f"{k} was {saved.get(k)}, is {now.get(k)}" for k in differ)
        raise ConfigError(
            f"{differ[0]}: {checkpoint} was written with another config ({told}); start a new output_dir"
        )


def flat(data: dict, prefix: str = "") -> dict:
    """Nested mappings as one, with dotted keys and plain values (what trackers take)."""
    out = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = (
                value if isinstance(value, int | float | str | bool) else json.dumps(value)
            )
    return out
