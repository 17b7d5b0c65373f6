"""Fact updates by finetuning, MemoryPrompt's comparison (2402.15268), and what the memories do to other text.

The base is finetuned on a history, statement after statement, a few gradient steps each, and then asked closed-book; one
finetuning a history. Other text is the unseen part of a prose file, in windows of a memory's segment. It is read by the
base, by the base after each finetuning, and behind what each memory gives before and after it read a history.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

import memlayers as ml
from memlayers.eval.experiment import Experiment, ExperimentConfig, Lines, Progress, Record, Table
from memlayers.eval.models import load_plain
from memlayers.eval.statistics import Mean, Share
from memlayers.eval.texts import ProseConfig, unseen_prose
from memlayers.limits import Count, Rate, Steps, Tokens
from memlayers.loading import load_tokenizer
from memlayers.tasks import Sample, UpdatesConfig, UpdatesTask, rng_for


class FinetunedConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        model: folder of the plain base.
        task: the fact updates.
        n_statements: lengths of the histories.
        n: histories of each length.
        steps: gradient steps on each statement.
        learning_rate: of plain Adam, new for each history.
        prose: other text; windows of `window` tokens.
        memories: name → folder of a trained memory with `{seed}`, whose effect on other text is measured.
    """

    experiment: Literal["finetuned"] = "finetuned"
    model: str
    task: UpdatesConfig = UpdatesConfig()
    n_statements: list[Count] = Field([4, 8, 16, 32], min_length=1)
    n: Count = 30
    steps: Steps = 3
    learning_rate: Rate = 1e-3
    prose: ProseConfig
    window: Tokens = Field(8, ge=2)
    memories: dict[str, str] = Field(default_factory=dict)


def run(config: FinetunedConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a history: whether its question is answered; and one a reading of other text."""
    base, tokenizer = load_plain(config.model), load_tokenizer(config.model)
    task = UpdatesTask(config.task, tokenizer, split="eval")
    prose = unseen_prose(config.prose, tokenizer, config.window).reshape(-1, config.window)
    yield {"text_after": "base", "unit": "prose", "perplexity": perplexity(base, prose)}
    for n_statements in config.n_statements:
        for index in progress(range(config.n), desc=f"{n_statements} statements"):
            sample = history(task, seed, n_statements, index, depth=index % 5 / 4)
            at, text = {"arm": "finetuned", "n_statements": n_statements, "unit": index}, {"unit": index}
            for arm, model in (("base", base), ("finetuned", finetuned(base, sample, config))):
                yield {**at, "arm": arm, "correct": answers(model, sample), "chance": task.chance}
            text["text_after"] = f"finetuned on {n_statements} statements"
            yield {**text, "perplexity": perplexity(model, prose)}
    for name, folder in config.memories.items():
        yield from behind_memory(name, ml.load(folder.format(seed=seed)), task, config, prose, seed)


def history(
    task: UpdatesTask, seed: int, n_statements: int, index: int, depth: float | None = None
) -> Sample:
    """One history with its question."""
    return task.sample(
        rng_for("eval", seed, n_statements * 1_000_000 + index), task.length_for(n_statements), depth
    )


def finetuned(base, sample: Sample, config: FinetunedConfig):
    """A copy of the base after `steps` of Adam on the object of each statement, one statement after the other."""
    model, size = copy.deepcopy(base).train(), config.task.statement_length
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    for statement in torch.tensor(sample.context).split(size):
        labels = statement.clone()
        labels[:-1] = -100  # the object alone is new; all the tokens in the loss leave less of it
        for _ in range(config.steps):
            optimizer.zero_grad()
            model(input_ids=statement[None], labels=labels[None], use_cache=False).loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def answers(model, sample: Sample) -> bool:
    """Whether the question alone is answered, greedily."""
    question = sample.questions[0]
    expected = question.answer_ids[:-1]  # the stop behind the object does not count
    ids, n = torch.tensor([[*question.ids, *expected]]), len(expected)
    predictions = model.eval()(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1].argmax(-1)
    return predictions.tolist() == expected


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, state: ml.MemoryState | None = None) -> float:
    """Of all tokens of (rows, window) but the first of each, behind what `state` holds."""
    total = 0.0
    for at in range(0, len(rows), 256):
        ids = rows[at : at + 256]
        reading = {}
        if state is not None:
            reading = {"memory_state": state.select([i % state.batch_size for i in range(len(ids))])}
        logits = model(input_ids=ids, use_cache=False, **reading).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / rows[:, 1:].numel())


def behind_memory(
    name: str, model, task: UpdatesTask, config: FinetunedConfig, prose: torch.Tensor, seed: int
) -> Iterator[Record]:
    """Perplexity behind the memory as it starts, and behind it after 64 histories of each length, one a row in turn."""
    at = {"unit": "prose", "text_after": f"{name}, nothing written"}
    yield {**at, "perplexity": perplexity(model.eval(), prose)}
    for n_statements in config.n_statements:
        contexts = [history(task, seed, n_statements, index).context for index in range(64)]
        state = ml.write(model, torch.tensor(contexts))
        at["text_after"] = f"{name}, {n_statements} statements written"
        yield {**at, "perplexity": perplexity(model, prose, state)}


EXPERIMENT = Experiment(
    title="Fact updates by finetuning, and other text",
    about="One finetuning a history: steps of Adam on each statement, in order; asked closed-book. Perplexity is that of other "
    "text. Control: the base, which was told nothing.",
    config=FinetunedConfig,
    run=run,
    keys=("arm", "n_statements", "text_after"),
    unit="history",
    metrics=(Share(), Mean("perplexity", "perplexity", digits=2)),
    controls=("base",),
    views=(
        Table(title="Share right, by statements", rows=("n_statements",), cols="arm", metrics=("accuracy",)),
        Table(title="Perplexity on other text", rows=("text_after",), metrics=("perplexity",)),
        Lines(title="Share right", file="finetuned", x="n_statements", hue="arm", metrics=("accuracy",)),
    ),
)
