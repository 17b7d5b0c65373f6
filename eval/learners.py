"""Who learns procedures, in batches: task tokens, or a LoRA; both with the same steps on the same uses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from pydantic import Field
from transformers import PreTrainedModel

import memlayers as ml
from memlayers.config import Strict
from memlayers.limits import Rate, Scale, Width
from memlayers.tasks.procedures import Procedure, ProceduresTask, Use


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


Target = tuple[list[int], list[int]]
"""A prompt, and what is to follow."""


class TokenLearner:
    """Task tokens: a row a procedure, added when its batch comes; earlier rows do not learn any more."""

    def __init__(self, settings: TaskTokensArm, model: PreTrainedModel, task: ProceduresTask):
        self.settings, self.model, self.task = settings, model, task
        config = ml.TaskTokensConfig(tied=settings.tied, renormalize=settings.renormalize)
        self.memory = ml.attach(model, config)

    def begin(self, batch: Sequence[Procedure]) -> list[torch.nn.Parameter]:
        """Make room for a batch; what learns."""
        for procedure in batch:
            words = " ".join(procedure.words) if self.settings.init_from_words else None
            self.memory.add(procedure.name, init_from=words, tokenizer=self.task.tokenizer)
        self.memory.learn([procedure.name for procedure in batch])
        return [row for row in self.memory.parameters() if row.requires_grad]

    def target(self, procedure: Procedure, use: Use) -> Target:
        """The token calls the procedure; then comes the answer."""
        return use.prompt, [self.memory.id_of(procedure.name), *use.answer]

    def after_step(self) -> None:
        """What follows a step of the optimizer."""
        if self.settings.renormalize:
            self.memory.renormalize_()


class LoraLearner:
    """One LoRA, which goes on learning with every batch."""

    def __init__(self, settings: LoraArm, model: PreTrainedModel, task: ProceduresTask):
        self.settings, self.model, self.task = settings, model, task
        head = model.get_output_embeddings()
        linear = {
            n.rsplit(".", 1)[-1]
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and m is not head
        }
        lora = LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=sorted(linear))
        inject_adapter_in_model(lora, model)

    def begin(self, batch: Sequence[Procedure]) -> list[torch.nn.Parameter]:
        """What learns: the adapter, whatever the batch."""
        return [x for name, x in self.model.named_parameters() if ".lora_" in name]

    def target(self, procedure: Procedure, use: Use) -> Target:
        """The answer, or the words and then the answer."""
        return use.prompt, use.answer if self.settings.says == "answer" else [*use.words, *use.answer]

    def after_step(self) -> None:
        """Nothing follows a step."""


LEARNERS = {"task_tokens": TokenLearner, "lora": LoraLearner}
Learner = TokenLearner | LoraLearner


def learn(
    learner: Learner,
    batch: Sequence[Procedure],
    earlier: Sequence[Procedure],
    config,
    rng: random.Random,
    bar: Callable = iter,
) -> None:
    """Train on a batch of procedures: AdamW, the rate falling to zero, the mean loss of the tokens that are to follow.

    config: with `steps` and `batch_size`. rng: gives the same uses to every learner, but for replay.
    Raises `ValueError` where the loss is not finite.
    """
    settings, draw = learner.settings, learner_uses(learner, batch, rng, config.batch_size)
    again = random.Random(rng.random())
    replayed = learner_uses(learner, earlier, again, settings.replay) if earlier and settings.replay else None
    parameters = learner.begin(batch)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, foreach=False)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    for step in bar(range(config.steps)):
        targets = next(draw) + (next(replayed) if replayed else [])
        loss = learner.model(**tensors(targets), use_cache=False).loss
        if not loss.isfinite():
            raise ValueError(f"step {step + 1}: the loss is {loss.item()}; lower the arm's learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        learner.after_step()


def learner_uses(
    learner: Learner, procedures: Sequence[Procedure], rng: random.Random, size: int
) -> Iterator[list[Target]]:
    """Batches of uses without end: each procedure in turn, in a new order every round."""
    task, queue = learner.task, []
    while True:
        while len(queue) < size:
            queue += rng.sample(list(procedures), len(procedures))
        drawn, queue = queue[:size], queue[size:]
        yield [learner.target(p, task.use(p, task.draw(rng, "train"))) for p in drawn]


def tensors(targets: Sequence[Target]) -> dict[str, torch.Tensor]:
    """input_ids and labels (batch, tokens), padded on the right, where causal attention needs no mask."""
    width = max(len(prompt) + len(rest) for prompt, rest in targets)
    ids = torch.zeros(len(targets), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, rest) in enumerate(targets):
        end = len(prompt) + len(rest)
        ids[row, :end] = torch.tensor([*prompt, *rest])
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return {"input_ids": ids, "labels": labels}
