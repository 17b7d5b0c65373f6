"""Batches, each a pure function of seed, step and process, so that a resumed run reads exactly what it would have.

Every source has `batch(position, rank, world, segments)`: `position` counts the forward passes of a process from
the run's first one. Item `i` of a batch has the number (position · world + rank) · batch_size + i, so processes
never share an item. `has_accuracy`: its items have answers. `by_item`: one is right when its whole answer is; else
answer tokens are counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from memlayers.tasks import MqarConfig, make_task, rng_for

from .config import LossSection, TaskData


@dataclass(frozen=True)
class Example:
    """Token ids of one item. Plain text is all `answer`; `answer_at` are places in `question` that are answers too."""

    context: Sequence[int]
    question: Sequence[int]
    answer: Sequence[int]
    answer_at: Sequence[int] = ()


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass; rows are padded on the left.

    Attributes:
        context_ids: (batch, context tokens) int64 to write to memory first (regime D), else None.
        context_mask: (batch, context tokens) int64, 0 at padding; None without padding.
        input_ids: (batch, tokens) int64.
        attention_mask: (batch, tokens) int64, 0 at padding; None without padding.
        parts: (batch, tokens) int64: what each token is, 0 padding, 1 context, 2 question, 3 answer.
        tail: the last so many tokens hold every question and answer.
        segments: the number of segments the items were made for, None where it has no meaning.
    """

    context_ids: torch.Tensor | None
    context_mask: torch.Tensor | None
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    parts: torch.Tensor
    tail: int
    segments: int | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens read, padding included."""
        return self.input_ids.numel() + (self.context_ids.numel() if self.context_ids is not None else 0)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


CONTEXT, QUESTION, ANSWER = 1, 2, 3


def collate(examples: list[Example], regime: str, segments: int | None = None) -> Batch:
    """One batch: in regime D the context apart from question and answer, else all in one sequence."""
    written = (
        [e.context for e in examples] if regime == "D" and any(len(e.context) for e in examples) else None
    )
    rows, parts = [], []
    for e in examples:
        before = [] if written else list(e.context)
        rows.append([*before, *e.question, *e.answer])
        asked = [QUESTION] * len(e.question)
        for place in e.answer_at:
            asked[place] = ANSWER
        parts.append([CONTEXT] * len(before) + asked + [ANSWER] * len(e.answer))
    tail = max(len(e.question) + len(e.answer) for e in examples)
    context_ids, context_mask = _pad(written) if written else (None, None)
    input_ids, attention_mask = _pad(rows)
    return Batch(context_ids, context_mask, input_ids, attention_mask, _pad(parts)[0], tail, segments)


def _pad(rows: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as one tensor with zeros on the left, and the mask if there are any."""
    width = max(map(len, rows))
    if all(len(row) == width for row in rows):
        return torch.from_numpy(
            np.array(rows, dtype=np.int64)
        ), None  # several times faster than torch.tensor
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class TaskSource:
    """Generated items of an exact length: `segments` × `segment_length` tokens with question and answer.

    0 segments are one segment that stays open: attention can reach the needle, memory is not asked for."""

    has_accuracy = True

    def __init__(self, data: TaskData, tokenizer, segment_length: int, batch_size: int, seed: int):
        self.task = make_task(data.task, tokenizer, split="train")
        self.regime, self.segment_length = data.regime, segment_length
        self.batch_size, self.seed = batch_size, seed
        self.by_item = not isinstance(data.task, MqarConfig)  # one of many queries is right by itself

    def batch(self, position: int, rank: int = 0, world: int = 1, segments: int | None = None) -> Batch:
        first = (position * world + rank) * self.batch_size
        examples = [self._item(first + i, max(segments, 1)) for i in range(self.batch_size)]
        return collate(examples, self.regime if segments else "W", segments)

    def _item(self, index: int, segments: int) -> Example:
        rng = rng_for("train", self.seed, index)
        sample = self.task.sample(rng, segments * self.segment_length)
        question = sample.questions[0] if len(sample.questions) == 1 else rng.choice(sample.questions)
        return Example(sample.context, question.ids, question.answer_ids, question.answer_at)


class ExampleSource:
    """A finite list of items, in a new order every epoch."""

    def __init__(
        self, examples: Sequence[Example], regime: str, batch_size: int, seed: int, has_accuracy: bool
    ):
        self.examples, self.regime = examples, regime
        self.has_accuracy = self.by_item = has_accuracy
        self.batch_size, self.seed = batch_size, seed
        self._epoch, self._order = -1, []

    def batch(self, position: int, rank: int = 0, world: int = 1, segments: int | None = None) -> Batch:
        return collate(self.items(position, rank, world), self.regime)

    def items(self, position: int, rank: int = 0, world: int = 1) -> list[Example]:
        """The items of a batch."""
        first = (position * world + rank) * self.batch_size
        return [self._item(first + i) for i in range(self.batch_size)]

    def _item(self, index: int) -> Example:
        epoch, place = divmod(index, len(self.examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.examples)))
            random.Random(f"memlayers:order:{self.seed}:{epoch}").shuffle(self._order)
        return self.examples[self._order[place]]


LOSS_PARTS = ((CONTEXT, "context"), (QUESTION, "rest"), (ANSWER, "answer"))


def loss_weights(section: LossSection, has_accuracy: bool) -> list[tuple[int, float]]:
    """(part, weight) pairs of the loss; plain text counts in full."""
    if not has_accuracy:
        return [(ANSWER, 1.0)]
    return [(part, weight) for part, name in LOSS_PARTS if (weight := getattr(section, name)) > 0]
