"""The config of the evaluation of learned procedures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from memlayers.config import ConfigError, Strict


class TaskTokensArm(Strict):
    """A task token a procedure.

    Attributes:
        learning_rate: of AdamW without weight decay.
        tied, renormalize: as in `TaskTokensConfig`.
        init_from_words: rows start at the mean of the words of the procedure, else at the mean of all rows.
        replay: uses of earlier procedures, a step, that are read along, so that new rows learn not to answer them.
    """

    type: Literal["task_tokens"] = "task_tokens"
    learning_rate: float = Field(1e-2, gt=0)
    tied: bool | None = None
    renormalize: bool = False
    init_from_words: bool = False
    replay: int = Field(0, ge=0)


class LoraArm(Strict):
    """One PEFT LoRA on all linear layers, that goes on learning from batch to batch.

    Attributes:
        learning_rate: of AdamW without weight decay.
        r, alpha: PEFT's `r` and `lora_alpha`.
        says: what it learns to say: the answer alone, or the words of the procedure and then the answer.
        replay: uses of earlier procedures, a step, that are learned along.
    """

    type: Literal["lora"] = "lora"
    learning_rate: float = Field(1e-2, gt=0)
    r: int = Field(4, ge=1)
    alpha: float = Field(8.0, gt=0)
    says: Literal["answer", "words"] = "answer"
    replay: int = Field(0, ge=0)


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
    batches: int = Field(4, ge=1)
    batch_procedures: int = Field(16, ge=1)
    arms: dict[str, AnyArm] = Field(min_length=1)
    steps: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=1)
    queries: int = Field(20, ge=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    ask_at_once: int = Field(320, ge=1)
    resamples: int = Field(2000, ge=100)
    note: str = ""

    @model_validator(mode="after")
    def _fits_together(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} names a value twice")
        if taken := {"base", "prompt"} & self.arms.keys():
            raise ConfigError(f"arms.{taken.pop()}: this name belongs to an arm that learns nothing")
        return self
