"""How many tokens a LoRA adapter remembers, over its rank.

    python -m memlayers.eval.capacity --config configs/eval/lora_capacity.yaml --out runs/lora_capacity

A text of random tokens, which nothing but the adapter can know, is written into it by `ml.write`. Remembered are the tokens
that are the most likely ones behind the tokens before them in their segment, less those that the base alone gets right.
The tokens are drawn alike from those of the words of the fictional facts, so that a guess is right once in as many. The
control `other text` reads another such text with the same adapter.

OUT gets, for each seed, report.json, samples.jsonl, report.md and capacity.png, and then summary.md and capacity.png over
all the seeds that lie there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from pydantic import Field, model_validator
from tqdm.auto import tqdm

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.eval.models import load_plain
from memlayers.eval.output import check_output, write_output
from memlayers.eval.speed.timing import where
from memlayers.eval.summary import over_seeds, reports_of_seeds, seeds_of, table, versions_of
from memlayers.limits import Seed, Tokens, Width
from memlayers.loading import load_tokenizer
from memlayers.tasks.fact_words import RELATIONS
from memlayers.writing import of_text
from memlayers.yaml_config import load_yaml

MEMORY = "notes"


class CapacityConfig(Strict):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint.
        ranks: each in the place of the memory's r, with the same lora_alpha / r.
        lengths: tokens of a text.
        memory: targets, and how it is written: steps, rate, segments.
        seeds: of texts and of the adapters' starts.
        note: for the report, how the settings were chosen.
    """

    model: str
    ranks: list[Width] = Field([1, 2, 4, 8, 16, 32, 64], min_length=1)
    lengths: list[Tokens] = Field([256, 1024], min_length=1)
    memory: ml.LoRAMemoryConfig = ml.LoRAMemoryConfig()
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _fits_together(self):
        for field in ("ranks", "lengths", "seeds"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ConfigError(f"{field}: {values} names a value twice")
        return self

    def of_rank(self, rank: int) -> ml.LoRAMemoryConfig:
        """The memory of this rank."""
        scaling = self.memory.lora_alpha / self.memory.r
        return self.memory.model_copy(update={"r": rank, "lora_alpha": scaling * rank})


def evaluate(config: CapacityConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed and write the files; the reports.

    Raises `FileNotFoundError` for a checkpoint that is not there, `ConfigError` for targets that it does not have,
    `ValueError` where the writing diverges.
    """
    reports = []
    for seed in config.seeds:
        check_output(Path(output_dir) / f"seed{seed}")
        report, samples = measure(config, seed, progress)
        write(report, samples, Path(output_dir) / f"seed{seed}")
        reports.append(report)
    write_summary(Path(output_dir))
    return reports


def measure(config: CapacityConfig, seed: int, progress: bool = False) -> tuple[dict, list[dict]]:
    """What report.json holds of one seed, and a row a rank and length with every token right (1) or not (0)."""
    started = time.perf_counter()
    base = load_plain(config.model)
    alphabet = tokens_of_words(load_tokenizer(config.model))
    rows = []
    cells = [(rank, length) for rank in config.ranks for length in config.lengths]
    for rank, length in tqdm(cells, desc=f"seed {seed}", unit="text", disable=not progress):
        rows.append(one_text(base, config.of_rank(rank), length, alphabet, seed))
    report = {
        "config": {**config.model_dump(), "seed": seed},
        "alphabet": len(alphabet),
        "cells": [{k: v for k, v in row.items() if k != "right"} for row in rows],
        **where("cpu", "transformers"),
        "wall_s": round(time.perf_counter() - started, 1),
    }
    return report, rows


def one_text(base, memory: ml.LoRAMemoryConfig, length: int, alphabet: Sequence[int], seed: int) -> dict:
    """Write a text into a fresh adapter of `base` and count; `base` is left as it was."""
    text, other = random_texts(alphabet, length, seed)
    segment_length = memory.writer.segment_length
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ml.attach(base, memory, name=MEMORY)
    try:
        started = time.process_time()
        state = ml.write(base, text)
        seconds = time.process_time() - started
        right, loss = read(base, text, state, segment_length)
        other_right, _ = read(base, other, state, segment_length)
        with ml.disabled(base):
            base_right, base_loss = read(base, text, None, segment_length)
    finally:
        ml.detach(base)
    n_parameters = sum(x.numel() for x in state[MEMORY].values())
    remembered = sum(right) - sum(base_right)
    return {
        "seed": seed,
        "rank": memory.r,
        "length": length,
        "parameters": n_parameters,
        "remembered": remembered,
        "tokens_a_parameter": remembered / n_parameters,
        "share": remembered / length,
        "base": sum(base_right),
        "other_text": sum(other_right),
        "loss": loss,
        "base_loss": base_loss,
        "cpu_s": seconds,
        "right": "".join(str(int(x)) for x in right),
    }


def tokens_of_words(tokenizer) -> list[int]:
    """The tokens that spell the objects of the fictional facts."""
    words = [f" {word}" for relation in RELATIONS.values() for word in relation.objects]
    return sorted({token for word in words for token in tokenizer(word, add_special_tokens=False).input_ids})


def random_texts(alphabet: Sequence[int], length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts (1, length + 1) of tokens drawn alike; the first token of each is not predicted."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(alphabet), (2, 1, length + 1), generator=generator)
    return tuple(torch.tensor(alphabet)[drawn])


@torch.no_grad()
def read(
    model, text: torch.Tensor, state: ml.MemoryState | None, segment_length: int
) -> tuple[list[bool], float]:
    """Which tokens of `text` (1, length + 1) but the first are the most likely in their segment, and the mean loss (nats)."""
    segments = of_text(text, torch.ones_like(text, dtype=torch.bool), segment_length)
    ids, mask, learned = (x[0] for x in segments)
    cache = {} if state is None else {"past_key_values": state.select([0] * len(ids)).to_cache()}
    logits = model(input_ids=ids, attention_mask=mask.long(), **cache).logits[:, :-1].float()
    learned, targets = learned[:, 1:], ids[:, 1:]
    right = (logits.argmax(-1) == targets)[learned]
    loss = torch.nn.functional.cross_entropy(logits[learned], targets[learned])
    return right.tolist(), loss.item()


def write(report: dict, samples: Sequence[dict], folder: Path) -> None:
    """samples.jsonl, capacity.png, report.md and report.json; raises as `write_output`."""
    pictures = {"capacity.png": lambda path: picture([report], path)}
    write_output(folder, {"report.md": markdown([report])}, pictures, report, samples)


def write_summary(folder: Path) -> None:
    """summary.md and capacity.png of all seeds in `folder`; raises as `reports_of_seeds`."""
    reports = reports_of_seeds(folder)
    pictures = {"capacity.png": lambda path: picture(reports, path)}
    write_output(folder, {"summary.md": markdown(reports)}, pictures)


def markdown(reports: Sequence[dict]) -> str:
    """A table ranks × lengths."""
    first = reports[0]
    config, writer = first["config"], first["config"]["memory"]["writer"]
    modules, layers = (config["memory"][name] or ["all"] for name in ("target_modules", "layers"))
    lines = [
        "# Tokens that a LoRA adapter remembers, over its rank",
        "",
        f"{config['model']}; seeds {seeds_of(reports)}: mean (lowest to highest). Random tokens from {first['alphabet']}, written by "
        f"{writer['steps']} steps of {writer['optimizer']} at rate {writer['learning_rate']:g} over all of the text, in "
        f"segments of {writer['segment_length']} tokens; modules: {', '.join(modules)}; layers: {', '.join(map(str, layers))}. Remembered: "
        "tokens that are the most likely ones behind those before them in their segment, less what the base alone gets "
        f"right; loss in nats a token. Other text: tokens of another random text that the same adapter gets right. "
        f"{config['note']}".rstrip(),
    ]
    for length in config["lengths"]:
        lines += ["", f"## {length:,} tokens", ""]
        rows = []
        for rank in config["ranks"]:
            cells = cells_of(reports, rank, length)
            shown = [
                ("remembered", 0),
                ("share", 3),
                ("tokens_a_parameter", 4),
                ("loss", 2),
                ("base", 0),
                ("other_text", 0),
            ]
            rows.append(
                [str(rank), f"{cells[0]['parameters']:,}", *(over_seeds(cells, *each) for each in shown)]
            )
        head = [
            "r",
            "parameters",
            "remembered",
            "share of the text",
            "tokens a parameter",
            "loss",
            "base",
            "other text",
        ]
        lines += table(head, rows)
    seconds = sum(cell["cpu_s"] for report in reports for cell in report["cells"])
    lines += [
        "",
        f"{first['device']}, {first['threads']} thread; {seconds:.0f} s of the CPU for writing; {versions_of(first)}.",
        "",
    ]
    return "\n".join(lines)


def cells_of(reports: Sequence[dict], rank: int, length: int) -> list[dict]:
    """One cell a seed."""
    return [c for report in reports for c in report["cells"] if (c["rank"], c["length"]) == (rank, length)]


def picture(reports: Sequence[dict], path: str | Path) -> None:
    """A PNG picture: tokens remembered, and tokens a parameter, over the rank; a line a length, from lowest to highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks, lengths = (reports[0]["config"][name] for name in ("ranks", "lengths"))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, field, title in zip(
        axes, ("remembered", "tokens_a_parameter"), ("tokens remembered", "tokens remembered a parameter")
    ):
        for number, length in enumerate(lengths):
            values = [[cell[field] for cell in cells_of(reports, rank, length)] for rank in ranks]
            axis.plot(ranks, [mean(v) for v in values], "o-", color=f"C{number}", label=f"{length:,} tokens")
            axis.fill_between(
                ranks, list(map(min, values)), list(map(max, values)), color=f"C{number}", alpha=0.2
            )
            if field == "remembered":
                axis.axhline(length, color=f"C{number}", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.set_xlabel("rank r")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/lora_capacity.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure how many tokens a LoRA adapter remembers, over its rank."""
    evaluate(load_yaml(config, overrides or [], CapacityConfig), out)
    typer.echo(f"wrote {out / 'summary.md'} and what lies beside it")


if __name__ == "__main__":
    typer.run(main)
