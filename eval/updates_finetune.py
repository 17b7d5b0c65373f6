"""Fact updates by finetuning, MemoryPrompt's comparison (2402.15268), and what the memories do to other text.

    python -m memlayers.eval.updates_finetune --config configs/eval/updates_finetune.yaml --out runs/updates_finetune

The base is finetuned on a history, statement after statement, a few gradient steps each, and then asked closed-book; one
finetuning a history. Other text is the unseen part of a prose file, in windows of a memory's segment. It is read by the
base, by the base after each finetuning, and behind what each memory gives before and after it read a history. Each seed gets
its report.json; summary.md is over all the seeds that lie in OUT.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from pydantic import Field
from tqdm.auto import tqdm

import memlayers as ml
from memlayers.config import Strict
from memlayers.eval.models import load_plain
from memlayers.eval.output import write_output
from memlayers.eval.perplexity import PerplexityConfig, unseen_prose
from memlayers.eval.statistics import wilson
from memlayers.eval.summary import over_seeds, reports_of_seeds, seeds_of, table
from memlayers.limits import Count, Rate, Seed, Steps, Tokens
from memlayers.loading import load_tokenizer
from memlayers.tasks import Sample, UpdatesConfig, UpdatesTask, rng_for
from memlayers.yaml_config import load_yaml


class FinetuneConfig(Strict):
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
        seeds: of the histories, and of the memories' folders.
        note: for the report, how the settings were chosen.
    """

    model: str
    task: UpdatesConfig = UpdatesConfig()
    n_statements: list[Count] = Field([4, 8, 16, 32], min_length=1)
    n: Count = 30
    steps: Steps = 3
    learning_rate: Rate = 1e-3
    prose: PerplexityConfig
    window: Tokens = Field(8, ge=2)
    memories: dict[str, str] = Field(default_factory=dict)
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    note: str = ""


def evaluate(config: FinetuneConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed and write the files; the reports. Raises `FileNotFoundError` for a missing model or text."""
    reports = []
    for seed in config.seeds:
        reports.append(measure(config, seed, progress))
        write_output(Path(output_dir) / f"seed{seed}", {}, report=reports[-1])
    write_output(output_dir, {"summary.md": summary(reports_of_seeds(Path(output_dir)))})
    return reports


def measure(config: FinetuneConfig, seed: int, progress: bool = False) -> dict:
    """What report.json holds of one seed."""
    base, tokenizer = load_plain(config.model), load_tokenizer(config.model)
    task = UpdatesTask(config.task, tokenizer, split="eval")
    prose = unseen_prose(config.prose, tokenizer, config.window).reshape(-1, config.window)
    cells, perplexities = {}, {"base": perplexity(base, prose)}
    for n_statements in config.n_statements:
        right, after = [], []
        for index in tqdm(range(config.n), desc=f"{n_statements} statements", disable=not progress):
            rng = rng_for("eval", seed, n_statements * 1_000_000 + index)
            sample = task.sample(rng, task.length_for(n_statements), index % 5 / 4)
            tuned = finetuned(base, sample, config)
            right.append(answers(tuned, sample))
            after.append(perplexity(tuned, prose))
        low, high = wilson(sum(right), len(right))
        cells[str(n_statements)] = {"n": len(right), "accuracy": mean(right), "ci_low": low, "ci_high": high}
        perplexities[f"finetuned on {n_statements} statements"] = mean(after)
    for name, folder in config.memories.items():
        perplexities |= behind_memory(name, ml.load(folder.format(seed=seed)), task, config, prose, seed)
    return {"config": {**config.model_dump(), "seed": seed}, "cells": cells, "perplexity": perplexities}


def finetuned(base, sample: Sample, config: FinetuneConfig):
    """A copy of the base after `steps` of Adam on the object of each statement, one statement after the other."""
    model, size = copy.deepcopy(base).train(), config.task.statement_length
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    for statement in torch.tensor(sample.context).split(size):
        told = statement.clone()
        told[:-1] = -100  # the object alone is new; all the tokens in the loss leave less of it
        for _ in range(config.steps):
            optimizer.zero_grad()
            model(input_ids=statement[None], labels=told[None], use_cache=False).loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def answers(model, sample: Sample) -> bool:
    """Whether the question alone is answered, greedily."""
    question = sample.questions[0]
    ids = torch.tensor(
        [[*question.ids, *question.answer_ids[:-1]]]
    )  # the stop behind the object does not count
    n = len(question.answer_ids) - 1
    said = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1].argmax(-1)
    return said.tolist() == question.answer_ids[:-1]


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, state: ml.MemoryState | None = None) -> float:
    """Of all tokens of (rows, window) but the first of each, behind what `state` holds."""
    total = 0.0
    for at in range(0, len(rows), 256):
        ids = rows[at : at + 256]
        kept = (
            {}
            if state is None
            else {"memory_state": state.select([i % state.batch_size for i in range(len(ids))])}
        )
        logits = model(input_ids=ids, use_cache=False, **kept).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / rows[:, 1:].numel())


def behind_memory(
    name: str, model, task: UpdatesTask, config: FinetuneConfig, prose, seed: int
) -> dict[str, float]:
    """Perplexity behind the memory as it starts, and behind it after 64 histories of each length, one a row in turn."""
    found = {f"{name}, nothing written": perplexity(model.eval(), prose)}
    for n_statements in config.n_statements:
        rngs = [rng_for("eval", seed, n_statements * 1_000_000 + index) for index in range(64)]
        contexts = [task.sample(rng, task.length_for(n_statements)).context for rng in rngs]
        state = ml.write(model, torch.tensor(contexts))
        found[f"{name}, {n_statements} statements written"] = perplexity(model, prose, state)
    return found


def summary(reports: list[dict]) -> str:
    """Markdown: accuracy over the number of statements, and perplexities."""
    config = reports[0]["config"]
    counts = list(reports[0]["cells"])
    row = [over_seeds([report["cells"][count] for report in reports], "accuracy", 3) for count in counts]
    each = [f"[{c['ci_low']:.3f}, {c['ci_high']:.3f}]" for c in (pooled(reports, count) for count in counts)]
    names = reports[0]["perplexity"]
    rows = [
        [k, over_seeds([{"perplexity": r["perplexity"][k]} for r in reports], "perplexity", 2)] for k in names
    ]
    return "\n".join(
        [
            "# Fact updates by finetuning, and other text",
            "",
            f"{config['n']} histories a seed and length, one finetuning each: {config['steps']} steps of Adam at rate "
            f"{config['learning_rate']} on each statement, in order; asked closed-book. Mean over seeds {seeds_of(reports)} (lowest to "
            f"highest), Wilson 95 % intervals of all. {config['note']}",
            "",
            *table(
                ["", *(f"{count} statements" for count in counts)], [["finetuned", *row], ["95 %", *each]]
            ),
            "",
            f"Perplexity on other text, windows of {config['window']} tokens:",
            "",
            *table(["", "perplexity"], rows),
            "",
        ]
    )


def pooled(reports: list[dict], count: str) -> dict:
    """Wilson's interval over all seeds."""
    n = sum(report["cells"][count]["n"] for report in reports)
    right = sum(round(report["cells"][count]["accuracy"] * report["cells"][count]["n"]) for report in reports)
    low, high = wilson(right, n)
    return {"ci_low": low, "ci_high": high}


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/updates_finetune.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure finetuning on fact updates."""
    evaluate(load_yaml(config, overrides or [], FinetuneConfig), out)
    typer.echo(f"wrote {out / 'summary.md'}")


if __name__ == "__main__":
    typer.run(main)
