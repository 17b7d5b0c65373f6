"""Before the first step: the accelerator, an output folder that is fresh or fits what it goes on from, and checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from memlayers.checkpoint import save_base_model
from memlayers.config import ConfigError, validate
from memlayers.tasks import MqarTask

from .config import TrainConfig
from .data import TaskSource
from .resume import clean, complete_checkpoints, saved_config
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


def prepare_output(config: TrainConfig, resume: bool, accelerator: Accelerator) -> Path | None:
    """Make `output_dir` ready; returns the checkpoint to resume from, if any.

    Raises:
        FileExistsError: there are checkpoints, and neither `resume` nor `overwrite`.
        ConfigError: the checkpoint was written with another config.
    """
    output, found = Path(config.output_dir), None
    folder = output / "checkpoints"
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir: {output} is a file, not a folder")
    present = complete_checkpoints(folder)
    if present and not resume and not config.overwrite:
        raise FileExistsError(
            f"{folder} already has {len(present)} checkpoints. Go on with --resume, start anew with overwrite=true, "
            "or choose another output_dir."
        )
    if resume and present:
        found = present[-1]
        compare_configs(with_defaults(saved_config(found)), config.model_dump(mode="json"), found)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if found is None:
            for name in ("checkpoints", "final"):
                shutil.rmtree(output / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
    accelerator.wait_for_everyone()
    if config.trackers:
        accelerator.init_trackers("memlayers", config=flat(config.model_dump(mode="json")))
    return found


def check_embeddings(model, source: Source) -> None:
    """Raise ConfigError when a task draws token ids that the model has no embedding for."""
    task = source.task if isinstance(source, TaskSource) else None
    if isinstance(task, MqarTask):
        task.check_embeddings(model.get_input_embeddings().weight.shape[0], where="data.task")


def keep_start(model, tokenizer, folder: Path, accelerator: Accelerator) -> None:
    """Write the base of a model with random weights before it learns, and name it as what the model comes from:
    evaluation compares with it."""
    if accelerator.is_main_process:
        save_base_model(model, folder)
        tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()
    model.config._name_or_path = str(folder)


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
