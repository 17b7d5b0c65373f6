"""How much of a text a cartridge keeps, over its tokens.

    python -m memlayers.eval.cartridge --config configs/eval/cartridge.yaml --out runs/cartridge

A text and its continuation fill the window of the base. Measured is the perplexity of the continuation, of the same tokens
in every arm (its first token is only read):

| arm | reads before the continuation |
|---|---|
| whole text | the text |
| nothing | the token that begins a text |
| last tokens | that token and the last k - 1 tokens of the text |
| not refined | a cartridge as it starts: what reading the first k tokens gives |
| any name of `writers` | the same cartridge, refined by that writer |
| the same, another text's | the refined cartridge of the next text |

OUT gets, for each seed, report.json, report.md and perplexity.png, and then summary.md and perplexity.png over all the
seeds that lie there. A seed whose report is there, of the same config, is not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import Field, model_validator
from tqdm.auto import tqdm

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.core.model import max_positions
from memlayers.eval import cartridge_report
from memlayers.eval.models import load_plain
from memlayers.eval.output import read_report
from memlayers.eval.speed.timing import where
from memlayers.files import read_text
from memlayers.limits import Count, Seed, Width
from memlayers.loading import load_tokenizer
from memlayers.writing import DistillSection, WriterSection, of_teacher
from memlayers.yaml_config import load_yaml

MEMORY = "notes"
END_OF_TEXT = "<|endoftext|>"


class TextsSection(Strict):
    """Where texts come from.

    Attributes:
        file: plain text, of which windows are drawn; `<|endoftext|>` in it parts texts. None: the base draws them itself.
        n: texts a seed.
    """

    file: str | None = None
    n: Count = Field(10, ge=2)


class CartridgeEvalConfig(Strict):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint.
        texts: sources by name.
        text_length: tokens of a text, with the one that begins it.
        continuation_length: tokens behind it.
        sizes: tokens of a cartridge. At `text_length` it holds the whole text and is not refined.
        writers: how a cartridge is refined, by the name of the arm.
        seeds: of the texts; and of the continuations that `distill` draws, beside its own seed.
        resamples: of the bootstrap.
        note: for the report, how the settings were chosen.
    """

    model: str
    texts: dict[str, TextsSection] = Field(min_length=1)
    text_length: Width = Field(384, ge=2)
    continuation_length: Width = Field(128, ge=2)
    sizes: list[Width] = Field([8, 19, 38, 77, 154, 384], min_length=1)
    writers: dict[str, WriterSection]
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    resamples: int = Field(2000, ge=100, le=1_000_000)
    note: str = ""

    @model_validator(mode="after")
    def _fits_together(self):
        for field in ("sizes", "seeds"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ConfigError(f"{field}: {values} names a value twice")
        if max(self.sizes) > self.text_length:
            raise ConfigError(
                f"sizes: {max(self.sizes)} is more than the {self.text_length} tokens of a text"
            )
        return self


def evaluate(config: CartridgeEvalConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed that is not there yet and write the files; the reports.

    Raises `FileNotFoundError` for a checkpoint or a file that is not there, `ConfigError` where a text does not fit the
    model or its file, `ValueError` where the writing diverges.
    """
    output_dir, reports = Path(output_dir), []
    for seed in config.seeds:
        path = output_dir / f"seed{seed}" / "report.json"
        described = json.loads(json.dumps({**config.model_dump(exclude={"seeds"}), "seed": seed}))
        report = read_report(path) if path.is_file() else {}
        if report.get("config") != described:
            report = {"config": described, **measure(config, seed, progress)}
            cartridge_report.write([report], path.parent, "report.md", report)
        reports.append(report)
    cartridge_report.write_summary(output_dir)
    return reports


def measure(config: CartridgeEvalConfig, seed: int, progress: bool = False) -> dict:
    """Cells {texts, arm, tokens, bytes, loss} of one seed: `loss` has the mean loss (nats) of each text's continuation."""
    started = time.perf_counter()
    base, tokenizer = load_plain(config.model).eval(), load_tokenizer(config.model)
    _check(config, base)
    refined = sum(size < config.text_length for size in config.sizes) * len(config.writers)
    bar = tqdm(total=len(config.texts) * refined, desc=f"seed {seed}", unit="write", disable=not progress)
    cells, seconds = [], {}
    for name, section in config.texts.items():
        rows = draw(base, tokenizer, section, config.text_length + config.continuation_length, seed)
        found = one_source(base, rows, config, seed, bar.update, seconds)
        cells += [{"texts": name, **cell} for cell in found]
    bar.close()
    return {
        "cells": cells,
        "cpu_s": {name: round(value, 1) for name, value in seconds.items()},
        **where("cpu", "transformers"),
        "wall_s": round(time.perf_counter() - started, 1),
    }


def one_source(
    base, rows: torch.Tensor, config: CartridgeEvalConfig, seed: int, advance: Callable, seconds: dict
) -> list[dict]:
    """The cells of texts with their continuations, rows (texts, tokens); `base` is left as it was."""
    text, asked = rows[:, : config.text_length], rows[:, config.text_length :]
    cells = []

    def add(arm: str, tokens: int, loss: torch.Tensor, nbytes: int = 0):
        cells.append(dict(arm=arm, tokens=tokens, bytes=nbytes, loss=[round(x, 6) for x in loss.tolist()]))

    add("whole text", config.text_length, after_reading(base, text, asked))
    add("nothing", 1, after_reading(base, text[:, :1], asked))
    lessons = {}
    for size in config.sizes:
        last = torch.cat([text[:, :1], text[:, config.text_length - size + 1 :]], 1)
        add("last tokens", size, after_reading(base, last, asked))
        with attached(base, size, WriterSection(steps=0)):
            start = ml.write(base, text)
            nbytes = start.nbytes // len(text)
            add("not refined", size, after_memory(base, start, asked), nbytes)
        if size == config.text_length:
            continue
        for arm, section in config.writers.items():
            with attached(base, size, of_seed(section, seed)) as memory:
                begun = time.process_time()
                if arm not in lessons:  # the base alone says what is learned from, whatever the size
                    lessons[arm] = memory.writer.lesson(base, text, torch.ones_like(text, dtype=torch.bool))
                state = ml.MemoryState({MEMORY: memory.writer.write(base, MEMORY, *lessons[arm], start)})
                seconds[arm] = seconds.get(arm, 0.0) + time.process_time() - begun
                add(arm, size, after_memory(base, state, asked), nbytes)
                other = state.select([*range(1, len(text)), 0])
                add(f"{arm}, another text's", size, after_memory(base, other, asked), nbytes)
            advance()
    return cells


class attached:
    """A cartridge of some tokens in `base`, for a block."""

    def __init__(self, base, n_tokens: int, writer: WriterSection):
        self.base, self.config = base, ml.CartridgeConfig(n_tokens=n_tokens, writer=writer)

    def __enter__(self):
        return ml.attach(self.base, self.config, name=MEMORY)

    def __exit__(self, *error):
        ml.detach(self.base)


def of_seed(section: WriterSection, seed: int) -> WriterSection:
    """The writer with continuations of a seed."""
    if section.distill is None:
        return section
    return section.model_copy(
        update={"distill": section.distill.model_copy(update={"seed": section.distill.seed + seed})}
    )


def draw(base, tokenizer, section: TextsSection, length: int, seed: int) -> torch.Tensor:
    """Texts (n, length) of one source, each behind the token that begins a text."""
    begin = tokenizer.bos_token_id
    if section.file is None:
        first = torch.full((1, 1), begin)
        drawn = DistillSection(continuations=section.n, length=length - 1, seed=seed)
        segments, _ = of_teacher(base, first, first.bool() | True, drawn)
        return torch.cat([first.expand(section.n, -1), segments.ids[0]], 1)
    path = Path(section.file)
    if not path.is_file():
        raise FileNotFoundError(f"texts.file: there is no file {section.file!r}")
    parts = [part.strip() for part in read_text(path).split(END_OF_TEXT)]
    encoded = tokenizer([part for part in parts if part], add_special_tokens=False, verbose=False).input_ids
    ids = torch.tensor([token for part in encoded for token in (begin, *part)])
    places = len(ids) - (length - 1) + 1
    if places < section.n:
        raise ConfigError(f"texts.n: {section.file!r} has {len(ids)} tokens, too few for {section.n} windows")
    starts = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[: section.n]
    windows = torch.stack([ids[start : start + length - 1] for start in starts])
    return torch.cat([windows.new_full((section.n, 1), begin), windows], 1)


@torch.no_grad()
def after_reading(base, before: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """(texts,): mean loss of `asked` but its first token, behind `before`."""
    logits = base(input_ids=torch.cat([before, asked], 1), use_cache=False).logits[:, before.shape[1] :]
    return losses(logits, asked)


@torch.no_grad()
def after_memory(model, state: ml.MemoryState, asked: torch.Tensor) -> torch.Tensor:
    """The same with a state and no text."""
    return losses(model(input_ids=asked, memory_state=state, use_cache=False).logits, asked)


def losses(logits: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), asked[:, 1:], reduction="none"
    )
    return each.mean(1)


def _check(config: CartridgeEvalConfig, base) -> None:
    need, limit = config.text_length + config.continuation_length, max_positions(base)
    if limit is not None and need > limit:
        raise ConfigError(
            f"text_length: with the continuation {need} tokens, the model has {limit} positions"
        )


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/cartridge.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure how much of a text a cartridge keeps, over its tokens."""
    evaluate(load_yaml(config, overrides or [], CartridgeEvalConfig), out)
    typer.echo(f"wrote {out / 'summary.md'} and what lies beside it")


if __name__ == "__main__":
    typer.run(main)
