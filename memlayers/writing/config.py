"""The fields of writing by gradient steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config import ConfigError, Strict
from ..limits import Count, Part, Rate, Scale, Seed, Tokens, Width


class DistillSection(Strict):
    """Context distillation on the model's own continuations (self-study, Cartridges, 2506.06266, section 4): the loss is
    KL(base that reads the text and the continuation || model that reads the continuation with what is written).

    The paper draws conversations about a chunk of the text; here the text is continued, which any base can do. The
    teacher's log-probabilities are kept while a text is written: continuations × length × vocabulary numbers a row.

    Attributes:
        continuations: drawn for each row, once, before the first step.
        length: tokens of each.
        batch: continuations that one step learns from, in turn; None: all.
        seed: of the draws; the same for all rows.
    """

    continuations: Part = 16
    length: Width = 128
    batch: Part | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits_together(self):
        if self.batch is not None and self.batch > self.continuations:
            raise ConfigError(f"batch: {self.batch} is more than the {self.continuations} continuations")
        return self


class WriterSection(Strict):
    """How a text is written: steps of an inner training, of one row's fields.

    Attributes:
        steps: gradient steps, over all of a text or in streaming mode over each segment.
        learning_rate: of the inner steps.
        optimizer: `adamw` (without decay) or `sgd`. Each row has its own.
        segment_length: tokens of a text that one forward pass reads together. The segments of a text are a batch, and
            every token but the first is predicted once, the first of a segment by the last of the one before.
        clip: largest norm of a row's gradient; None: no clipping.
        distill: learn what the base says that has the text before it, and not the text's own next tokens; `segment_length`
            has no part in it.
        streaming: write segment after segment, each with what those before it left (Temp-LoRA, 2401.11504),
            instead of all at the same time (PERK, 2507.06415).
        learned_steps: each inner step has a learned rate for each tensor (PERK); `learning_rate` is where they start.
        token_weights: a learned weight for each token of a text, from its hidden state (PERK); all start at 1.
        outer_gradient: in training, how the gradient of what was written comes back to the start: `maml`, through the
            inner steps; `fomaml`, as if they did not depend on the start; `reptile`, the same and the way that the
            steps went (1803.02999).
        unroll: with `maml`, how many of the last inner steps the gradient passes through; through those before it
            passes as in `fomaml`. None: all.
    """

    steps: int = Field(4, ge=0, le=1_000_000)
    learning_rate: Rate = 5e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    segment_length: Tokens = 256
    clip: Scale | None = None
    distill: DistillSection | None = None
    streaming: bool = False
    learned_steps: bool = False
    token_weights: bool = False
    outer_gradient: Literal["maml", "fomaml", "reptile"] = "maml"
    unroll: Count | None = None

    @model_validator(mode="after")
    def _fits_together(self):
        for field in ("streaming", "token_weights"):
            if self.distill is not None and getattr(self, field):
                raise ConfigError(
                    f"{field}: distill reads the text whole and learns no token of it; leave one out"
                )
        if self.unroll is not None and self.unroll > self.steps:
            raise ConfigError(f"unroll: {self.unroll} is more than the {self.steps} steps")
        if self.unroll is not None and self.outer_gradient != "maml":
            raise ConfigError(
                f"unroll: {self.outer_gradient} passes through no step; leave unroll out, or set outer_gradient: maml"
            )
        return self

    @property
    def n_unrolled(self) -> int:
        """Last inner steps that the outer gradient passes through."""
        if self.outer_gradient != "maml":
            return 0
        return self.steps if self.unroll is None else self.unroll
