"""How much of a text a cartridge keeps, over its tokens.

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
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.core.model import max_positions
from memlayers.eval.experiment import Experiment, ExperimentConfig, Lines, Progress, Record, Table, Unique
from memlayers.eval.models import load_plain
from memlayers.eval.probes import token_losses
from memlayers.eval.statistics import Mean, Perplexity
from memlayers.files import read_text
from memlayers.limits import Count, Width
from memlayers.loading import load_tokenizer
from memlayers.writing import DistillSection, WriterSection, of_teacher

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


class CartridgeEvalConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint.
        texts: sources by name.
        text_length: tokens of a text, with the one that begins it.
        continuation_length: tokens behind it.
        sizes: tokens of a cartridge. At `text_length` it holds the whole text and is not refined.
        writers: how a cartridge is refined, by the name of the arm.
        seeds: of the texts; and of the continuations that `distill` draws, beside its own seed.
    """

    experiment: Literal["cartridge"] = "cartridge"
    model: str
    texts: dict[str, TextsSection] = Field(min_length=1)
    text_length: Width = Field(384, ge=2)
    continuation_length: Width = Field(128, ge=2)
    sizes: Annotated[list[Width], Unique] = Field([8, 19, 38, 77, 154, 384], min_length=1)
    writers: dict[str, WriterSection]

    @model_validator(mode="after")
    def _fits_together(self):
        if max(self.sizes) > self.text_length:
            raise ConfigError(
                f"sizes: {max(self.sizes)} is more than the {self.text_length} tokens of a text"
            )
        return self


def run(config: CartridgeEvalConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a text, arm and size, and one a writer with the seconds of the CPU that it took.

    Raises `FileNotFoundError` for a file that is not there, `ConfigError` where a text does not fit the model or its file,
    `ValueError` where the writing diverges.
    """
    base, tokenizer = load_plain(config.model).eval(), load_tokenizer(config.model)
    _check(config, base)
    refined = sum(size < config.text_length for size in config.sizes) * len(config.writers)
    bar, seconds = progress(total=len(config.texts) * refined, desc=f"seed {seed}", unit="write"), {}
    for name, section in config.texts.items():
        rows = draw(base, tokenizer, section, config.text_length + config.continuation_length, seed)
        cells = list(one_source(base, rows, config, seed, bar.update, seconds))
        read, nothing = (
            next(loss for arm, _, _, loss in cells if arm == wanted) for wanted in ("whole text", "nothing")
        )
        for arm, tokens, nbytes, losses in cells:
            for number, loss in enumerate(losses):
                yield {
                    "texts": name,
                    "arm": arm,
                    "tokens": tokens,
                    "bytes": nbytes,
                    "unit": number,
                    "loss": loss,
                    "excess": loss - read[number],
                    "gained": nothing[number] - loss,
                    "whole": nothing[number] - read[number],
                }
    bar.close()
    for arm, value in seconds.items():
        yield {"arm": arm, "unit": "seed", "cpu_s": round(value, 1)}


def one_source(
    base, rows: torch.Tensor, config: CartridgeEvalConfig, seed: int, advance: Callable, seconds: dict
) -> Iterator[tuple[str, int, int, list[float]]]:
    """(arm, tokens, bytes, the mean loss in nats of each text's continuation) of texts with their continuations, rows
    (texts, tokens); `base` is left as it was."""
    text, asked = rows[:, : config.text_length], rows[:, config.text_length :]

    def cell(arm: str, tokens: int, loss: torch.Tensor, nbytes: int = 0):
        return arm, tokens, nbytes, [round(x, 6) for x in loss.tolist()]

    yield cell("whole text", config.text_length, after_reading(base, text, asked))
    yield cell("nothing", 1, after_reading(base, text[:, :1], asked))
    targets = {}
    for size in config.sizes:
        last = torch.cat([text[:, :1], text[:, config.text_length - size + 1 :]], 1)
        yield cell("last tokens", size, after_reading(base, last, asked))
        with attached(base, size, WriterSection(steps=0)):
            start = ml.write(base, text)
            nbytes = start.nbytes // len(text)
            yield cell("not refined", size, after_memory(base, start, asked), nbytes)
        if size == config.text_length:
            continue
        for arm, section in config.writers.items():
            with attached(base, size, of_seed(section, seed)) as memory:
                begun = time.process_time()
                if arm not in targets:  # the base alone says what is learned from, whatever the size
                    targets[arm] = memory.writer.lesson(base, text, torch.ones_like(text, dtype=torch.bool))
                state = ml.MemoryState({MEMORY: memory.writer.write(base, MEMORY, *targets[arm], start)})
                seconds[arm] = seconds.get(arm, 0.0) + time.process_time() - begun
                yield cell(arm, size, after_memory(base, state, asked), nbytes)
                other = state.select([*range(1, len(text)), 0])
                yield cell(f"{arm}, another text's", size, after_memory(base, other, asked), nbytes)
            advance()


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
    return token_losses(base, torch.cat([before, asked], 1))[:, before.shape[1] :].mean(1)


@torch.no_grad()
def after_memory(model, state: ml.MemoryState, asked: torch.Tensor) -> torch.Tensor:
    """The same with a state and no text."""
    return token_losses(model, asked, memory_state=state).mean(1)


def _check(config: CartridgeEvalConfig, base) -> None:
    need, limit = config.text_length + config.continuation_length, max_positions(base)
    if limit is not None and need > limit:
        raise ConfigError(
            f"text_length: with the continuation {need} tokens, the model has {limit} positions"
        )


EXPERIMENT = Experiment(
    title="Perplexity of a continuation, with a cartridge in place of the text",
    about="The same tokens are predicted in every arm. Beside reading: perplexity over that of reading the whole text. Kept: "
    "share of what the text helps, in log perplexity. Bytes: of the state, a text. Control: another text's cartridge.",
    config=CartridgeEvalConfig,
    run=run,
    keys=("texts", "arm", "tokens"),
    unit="text",
    metrics=(
        Perplexity(digits=3),
        Perplexity("excess", "beside reading", digits=3),
        Mean("gained", "kept", of="whole"),
        Mean("cpu_s", "CPU s", digits=0),
    ),
    views=(
        Table(
            title="{texts}",
            by=("texts",),
            rows=("arm", "tokens", "bytes"),
            metrics=("perplexity", "beside reading", "kept"),
        ),
        Table(title="Seconds of the CPU, for writing", rows=("arm",), metrics=("CPU s",)),
        Lines(
            title="Perplexity beside that of reading the text",
            file="perplexity",
            panels=("texts",),
            x="tokens",
            hue="arm",
            metrics=("beside reading",),
        ),
    ),
)
