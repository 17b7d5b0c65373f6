"""The sections of a training YAML that say how parameters move: optimizers, schedule, sparse finetuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memlayers.config import Strict
from memlayers.limits import Beta, Count, Epsilon, Rate, Steps, Tokens, Weight


class ValuesSection(Strict):
    """A `RowSparseAdamW` for the memories' value tables: a step costs what the rows that were read
    cost, see `memlayers.optim`.

    Attributes:
        learning_rate: of the tables; ten times that of the rest in 2412.09764.
        state: how moments are kept: `float32` (8 bytes an element), `bfloat16` (4, stochastic rounding) or `row`
            (4, one second moment a row).
        betas: the two decay rates.
        eps: epsilon.
        weight_decay: acts on a row when it is read.
    """

    learning_rate: Rate = 1e-3
    state: Literal["float32", "bfloat16", "row"] = "float32"
    betas: list[Beta] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: Epsilon = 1e-8
    weight_decay: Weight = 0.0


class OptimizerSection(Strict):
    """AdamW, with a learning rate for the memory and one for base or LoRA.

    Attributes:
        learning_rate: of the memory (and of everything when the two below are None).
        base_learning_rate: of the base's parameters; None: `learning_rate`.
        lora_learning_rate: of the LoRA; None: `learning_rate`.
        weight_decay: on matrices only; norms, biases and the vectors a memory starts from have none.
        betas: AdamW's two decay rates.
        eps: AdamW's epsilon.
        fused: torch's fused step.
        values: an optimizer of their own for the memories' value tables; None: they learn as the rest of the memory
            does, with dense gradients.
    """

    type: Literal["adamw"] = "adamw"
    learning_rate: Rate = 1e-3
    base_learning_rate: Rate | None = None
    lora_learning_rate: Rate | None = None
    weight_decay: Weight = 0.0
    betas: list[Beta] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: Epsilon = 1e-8
    fused: bool = True
    values: ValuesSection | None = None


class SparseFinetuningSection(Strict):
    """Only the slots that the new data reads and other text does not may change, see
    `memlayers.train.sparse_finetuning`.

    Attributes:
        top_t: slots of each value table that may change in a step.
        files: background text, whose slots are kept: paths or globs.
        length: tokens of a background sequence.
        batch_size: sequences of a background batch; a batch must not read nearly all slots of the table, or there
            is nothing to rank by.
        n_batches: batches that are read before training begins.
    """

    top_t: Steps = 500
    files: list[str] = Field(min_length=1)
    length: Tokens = Field(64, ge=2)
    batch_size: Count = 1
    n_batches: Count = 1000


class ScheduleSection(Strict):
    """Learning rate over the run, from `transformers.get_scheduler`.

    Attributes:
        type: shape after the warm-up; `linear` and `cosine` end at 0 at `max_steps`.
        warmup_steps: steps of linear warm-up.
    """

    type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
