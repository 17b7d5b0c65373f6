"""Generated tasks: token-level items made by the model's own tokenizer, for training and for evaluation.

    task = make_task(PasskeyConfig(digits=5), tokenizer, split="train")
    sample = task.sample(rng_for("train", seed=0, index=7), length=512, depth=0.5)

`length` counts context, question and answer, as in RULER. Training and evaluation share nothing: other random
streams (`rng_for`), other keys (`kinds.split_of`), and other parts of a prose file (`filler.ProseFiller`). The
exceptions are the facts (`facts.FactsTask`) and procedures (`procedures.ProceduresTask`), which have no context: what
was taught is what is asked, procedures with other symbols; and associative recall (`mqar.MqarTask`) and fact updates
(`updates.UpdatesTask`), whose keys have another value in every row.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from memlayers.tasks.facts import Fact, FactsConfig, FactsTask
from memlayers.tasks.haystack import Question, Sample, rng_for
from memlayers.tasks.kinds import Split
from memlayers.tasks.mqar import MqarConfig, MqarTask
from memlayers.tasks.needle import NeedleConfig, NeedleTask
from memlayers.tasks.passkey import PasskeyConfig, PasskeyTask
from memlayers.tasks.procedures import ProceduresConfig, ProceduresTask
from memlayers.tasks.updates import UpdatesConfig, UpdatesTask

TASKS = {"passkey": PasskeyTask, "needle": NeedleTask, "mqar": MqarTask, "updates": UpdatesTask}

HaystackConfig = Annotated[PasskeyConfig | NeedleConfig | UpdatesConfig, Field(discriminator="type")]
"""Tasks of text, whose answers are read from what a model generates."""

TaskConfig = Annotated[PasskeyConfig | NeedleConfig | MqarConfig | UpdatesConfig, Field(discriminator="type")]

Task = PasskeyTask | NeedleTask | MqarTask | UpdatesTask


def make_task(config: TaskConfig, tokenizer, split: Split = "train") -> Task:
    """The generator for `config` and `tokenizer`.

    Raises `ValueError` when the tokenizer cannot spell the needles or has too few tokens, `FileNotFoundError` for a
    missing prose file.
    """
    return TASKS[config.type](config, tokenizer, split)


__all__ = [
    "TASKS",
    "Fact",
    "FactsConfig",
    "FactsTask",
    "HaystackConfig",
    "MqarConfig",
    "MqarTask",
    "NeedleConfig",
    "NeedleTask",
    "PasskeyConfig",
    "PasskeyTask",
    "ProceduresConfig",
    "ProceduresTask",
    "Question",
    "Sample",
    "Split",
    "Task",
    "TaskConfig",
    "UpdatesConfig",
    "UpdatesTask",
    "make_task",
    "rng_for",
]
