"""The fields of a training YAML: strict, typed, in the words of TRL, torchtune and PEFT."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from memlayers.config import ConfigError, Strict, validate
from memlayers.kinds import AnyMemoryConfig
from memlayers.limits import Count, Scale, Seed, Steps, Weight, Width

from .data_config import (
    AnyData,
    BackgroundSection,
    DatasetData,
    FactsData,
    JsonlData,
    ProceduresData,
    TaskData,
    TextData,
)
from .optimizer_config import OptimizerSection, ScheduleSection, SparseFinetuningSection, ValuesSection

__all__ = [
    "AnyData",
    "BackgroundSection",
    "CurriculumSection",
    "DatasetData",
    "FactsData",
    "JsonlData",
    "LoraSection",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "ProceduresData",
    "ScheduleSection",
    "SparseFinetuningSection",
    "TaskData",
    "TextData",
    "TrainConfig",
    "ValuesSection",
]


MOST_SEGMENTS = 100_000
"""Segments of an item; a curriculum may have as many stages."""


class ModelSection(Strict):
    """Which model is trained: a checkpoint by `path`, or a random one by `config`.

    Attributes:
        path: folder or hub id of a causal language model, or of what `memlayers.save` wrote.
        config: fields of a Hugging Face config, `model_type` among them; builds a model with random weights.
        tokenizer: folder or hub id of the tokenizer; None: `path`.
        dtype: in which the weights are held and trained.
    """

    path: str | None = None
    config: dict[str, pydantic.JsonValue] | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.config is None):
            raise ConfigError("path: give either path (a checkpoint) or config (a model with random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError("config: needs a model_type, such as llama")
        if self.config is not None and self.tokenizer is None:
            raise ConfigError("tokenizer: a model from config needs one, a folder or hub id")
        return self


def _modules(value: Any) -> list[str] | str:
    if value == "all-linear" or (
        isinstance(value, list) and value and all(isinstance(v, str) for v in value)
    ):
        return value
    raise ValueError("needs a list of names of layers, or all-linear")


class LoraSection(Strict):
    """A PEFT LoRA on the base, trained beside the memory; fields as in `peft.LoraConfig`.

    Attributes:
        r: rank.
        alpha: PEFT's `lora_alpha`.
        dropout: PEFT's `lora_dropout`.
        target_modules: names of linear layers, or `all-linear`.
    """

    r: Width = 16
    alpha: Scale = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[list[str] | Literal["all-linear"], PlainValidator(_modules)] = "all-linear"


class LossSection(Strict):
    """Weights of mean cross-entropies that are summed. Plain text has `cycle` and one more, of weight 1.

    Attributes:
        answer: answer tokens.
        rest: the other tokens of question and answer.
        context: tokens of the context (in regime D it costs the logits of the whole context).
        cycle: what is written (in regime D the context, else all), by a loss that a memory has of its own, such as that
            of reading it back.
    """

    answer: Weight = 1.0
    rest: Weight = 0.2
    context: Weight = 0.0
    cycle: Weight = 0.0

    @model_validator(mode="after")
    def _something_to_learn(self):
        if not any(self.model_dump().values()):
            raise ConfigError("answer: all weights are 0, so that there is nothing to learn; set one above 0")
        return self


class SegmentRange(Strict):
    """Stages from `start` to `stop` segments, both included."""

    start: int = Field(1, ge=0, le=MOST_SEGMENTS)
    stop: int = Field(ge=1, le=MOST_SEGMENTS)
    step: int = Field(1, ge=1, le=MOST_SEGMENTS)

    @model_validator(mode="after")
    def _order(self):
        if self.stop < self.start:
            raise ConfigError("stop: must not be below start")
        return self


def _stages(value: Any) -> list[int] | SegmentRange:
    if isinstance(value, SegmentRange) or (isinstance(value, list) and all(type(v) is int for v in value)):
        return value
    if isinstance(value, dict):
        return validate(SegmentRange, value)
    raise ValueError("needs a list of whole numbers, or start and stop")


def _plain(stages: list[int] | SegmentRange) -> list[int] | dict:
    return stages.model_dump() if isinstance(stages, SegmentRange) else stages


class CurriculumSection(Strict):
    """Number of segments of an item, raised when accuracy allows it.

    Attributes:
        segments: the stages, as a rising list or as start and stop. Stage 0 is one segment that stays open, so
            that attention can reach the needle: a base learns the question there before memory is asked.
        threshold: accuracy, averaged over `window` steps at the current stage, that opens the next one.
        window: steps averaged.
        varied: draw the number of segments of each batch from 1 stage to the current one, so that shorter
            inputs are not forgotten.
        current_share: share of the batches that get the current stage's number when varied.
    """

    segments: Annotated[list[int] | SegmentRange, PlainValidator(_stages), PlainSerializer(_plain)]
    threshold: float = Field(0.9, gt=0, le=1)
    window: Count = 20
    varied: bool = True
    current_share: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _rising(self):
        stages = self.stages
        rising = bool(stages) and stages == sorted(set(stages))
        if not rising or stages[0] < 0 or not 1 <= stages[-1] <= MOST_SEGMENTS:
            raise ConfigError(
                f"segments: must be a rising list of numbers from 0 or 1, at most {MOST_SEGMENTS:,}"
            )
        return self

    @property
    def stages(self) -> list[int]:
        """Number of segments of every stage."""
        if isinstance(self.segments, list):
            return self.segments
        return list(range(self.segments.start, self.segments.stop + 1, self.segments.step))


class TrainConfig(Strict):
    """One training run.

    Attributes:
        model: what is trained.
        memories: name → config of every memory to attach; empty for a baseline with full attention.
        train_what: parameters that learn; `values` are the memories' tables alone.
        lora: PEFT LoRA on the base; needed for `memory_and_lora`, else left out.
        data, loss, curriculum, optimizer, schedule: see the sections.
        sparse_finetuning: which slots may change; None: all that are read.
        background: text that is to stay as the base has it; None: nothing holds it.
        batch_size: items per process and forward pass.
        gradient_accumulation: forward passes per step.
        max_steps: optimizer steps.
        stop_at: accuracy, averaged over the curriculum's window at its last stage, that ends the run early.
        clip: largest gradient norm; None: no clipping.
        precision: `bf16` runs the forward pass under autocast.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of initial values, data and dropout.
        log_every: steps averaged in one line of `log.jsonl`.
        checkpoint_every: steps between checkpoints; None: only at the end.
        keep_checkpoints: newest checkpoints kept.
        output_dir: everything the run writes.
        overwrite: replace what an earlier run of `memlayers train` left in `output_dir`; final/ stays until the new one is ready.
        trackers: `tensorboard` and the other names accelerate knows.
        num_processes: how many were started; checked, because a launcher can silently start one.
    """

    model: ModelSection
    memories: dict[str, AnyMemoryConfig] = Field(default_factory=dict)
    train_what: Literal["memory", "memory_and_base", "memory_and_lora", "values"] = "memory"
    lora: LoraSection | None = None
    data: AnyData
    loss: LossSection = LossSection()
    curriculum: CurriculumSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    sparse_finetuning: SparseFinetuningSection | None = None
    background: BackgroundSection | None = None
    schedule: ScheduleSection = ScheduleSection()
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    max_steps: Steps = 1000
    stop_at: float | None = Field(None, gt=0, le=1)
    clip: Scale | None = 1.0
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    seed: Seed = 0
    log_every: Steps = 10
    checkpoint_every: Steps | None = None
    keep_checkpoints: Count = 2
    output_dir: str
    overwrite: bool = False
    trackers: list[str] = Field(default_factory=list)
    num_processes: Width = 1

    @model_validator(mode="after")
    def _fits_together(self):
        if (self.train_what == "memory_and_lora") != (self.lora is not None):
            raise ConfigError("lora: give this section with train_what: memory_and_lora, and only then")
        if self.sparse_finetuning and not (self.train_what == "values" and self.optimizer.values):
            raise ConfigError(
                "sparse_finetuning: works on value tables alone; set train_what: values and give optimizer.values"
            )
        prompts = isinstance(self.data, FactsData) and self.data.facts.n_neighbours
        if self.background is not None and self.background.neighbours and not prompts:
            raise ConfigError(
                "background.neighbours: only data of type facts with n_neighbours has such prompts"
            )
        if isinstance(self.data, TaskData) and (self.data.segments is None) == (self.curriculum is None):
            raise ConfigError("data.segments: give a number of segments here, or a curriculum, not both")
        if self.curriculum is not None and not isinstance(self.data, TaskData):
            raise ConfigError(
                f"curriculum: only data of type task has segments to count, not {self.data.type!r}"
            )
        if self.stop_at is not None and not isinstance(self.data, TaskData):
            raise ConfigError(f"stop_at: only data of type task has an accuracy, not {self.data.type!r}")
        if self.num_processes > 1 and self.gradient_checkpointing == "reentrant":
            raise ConfigError(
                "gradient_checkpointing: reentrant checkpointing does not work with several processes; "
                "use non_reentrant"
            )
        return self
