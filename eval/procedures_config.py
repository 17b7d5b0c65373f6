"""The config of the evaluation of learned procedures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from memlayers.config import ConfigError, Strict
from memlayers.limits import Count, Rate, Scale, Seed, Steps, Width


class TaskTokensArm(Strict):
    """A task token a procedure.

    Attributes:
        learning_rate: of AdamW without weight decay.
        tied, renormalize: as in `TaskTokensConfig`.
        init_from_words: rows start at the mean of the words of the procedure, else at the mean of all rows.
        replay: uses of earlier procedures, a step, that are read along, so that new rows learn not to answer them.
    """

    type: Literal["task_tokens"] = "task_tokens"
    learning_rate: Rate = 1e-2
    tied: bool | None = None
    renormalize: bool = False
    init_from_words: bool = False
    replay: int = Field(0, ge=0, le=1_000_000)


class LoraArm(Strict):
    """One PEFT LoRA on all linear layers, that goes on learning from batch to batch.

    Attributes:
        learning_rate: of AdamW without weight decay.
        r, alpha: PEFT's `r` and `lora_alpha`.
        says: what it learns to say: the answer alone, or the words of the procedure and then the answer.
        replay: uses of earlier procedures, a step, that are learned along.
    """

    type: Literal["lora"] = "lora"
    learning_rate: Rate = 1e-2
    r: Width = 4
    alpha: Scale = 8.0
    says: Literal["answer", "words"] = "answer"
    replay: int = Field(0, ge=0, le=1_000_000)


AnyArm = Annotated[TaskTokensArm | LoraArm, Field(discriminator="type")]


class ProceduresEvalConfig(Strict):
    """What is measured.

    Attributes:
        base: folder of a base that `train/procedures_base.py` made.
        batches, batch_procedures: batches of so many procedures come one after the other.
        arms: name -> how it learns them. All see the same uses in the same order.
        steps, batch_size: of the training on a batch of procedures; batch_size uses of them a step.
        queries: of each procedure, with symbols that no training has.
        seeds: of procedures, uses and initial values.
        ask_at_once: queries of one call of `generate`.
        resamples: of the bootstrap.
        note: for the report, how the settings were chosen.
    """

    base: str
    batches: Count = 4
    batch_procedures: Count = 16
    arms: dict[str, AnyArm] = Field(min_length=1)
    steps: Steps = 200
    batch_size: Count = 64
    queries: Count = 20
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    ask_at_once: Count = 320
    resamples: int = Field(2000, ge=100, le=1_000_000)
    note: str = ""

    @model_validator(mode="after")
    def _fits_together(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} names a value twice")
        if taken := {"base", "prompt"} & self.arms.keys():
            raise ConfigError(f"arms.{taken.pop()}: this name belongs to an arm that learns nothing")
        return self
