"""How many bits of a text each kind of memory can hold, over its size.

    python -m memlayers.eval.bits --config configs/eval/bits.yaml --out runs/bits

A text of random tokens, each of an alphabet equally likely, cannot be guessed: every token of it that is recalled is
worth log2(alphabet) bits. The alphabet is the tokens that spell the objects of the fictional facts, since a checkpoint
has tokens that it never learned and cannot say. What a memory keeps for one text (its state; the table or the rows of a
memory in parameters) is trained, on the frozen model, to predict the text; recalled are the tokens that are then the
most likely ones behind those before them. Short and long texts are tried, and the most bits count. A reversible memory
is read in two ways: by the base, as memory tokens are, and back by its own compressor, which must have learned other
random texts first.

This asks what a memory has room for on that model, not what a trained memory writes there by itself. The control
`other text` reads another text with the same memory.

OUT gets, for each seed, report.json, and then summary.md and bits.png over all the seeds that lie there; a seed that has
its report is not measured again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tqdm.auto import tqdm

import memlayers as ml
from memlayers.core.memory import StatefulMemory, fresh_state
from memlayers.core.state import PENDING
from memlayers.eval.bits_config import BitsConfig, Ladder
from memlayers.eval.bits_report import markdown, picture
from memlayers.eval.capacity import tokens_of_words
from memlayers.eval.models import load_plain
from memlayers.eval.output import write_output
from memlayers.eval.reversible import fit
from memlayers.eval.speed.timing import where
from memlayers.eval.summary import reports_of_seeds
from memlayers.loading import load_tokenizer
from memlayers.yaml_config import load_yaml

MEMORY = "held"
N_LEARNED = 100_000
"""Random tokens that a compressor learns on."""


def evaluate(config: BitsConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed that has no report yet and write the files; the reports.

    Raises `FileNotFoundError` for a checkpoint that is not there, `ConfigError` for a memory that does not fit it,
    `ValueError` where the folder holds reports of another config.
    """
    folder = Path(output_dir)
    for seed in config.seeds:
        if not (folder / f"seed{seed}" / "report.json").is_file():
            write_output(folder / f"seed{seed}", {}, report=measure(config, seed, progress))
    reports = reports_of_seeds(folder)
    write_output(folder, {"summary.md": markdown(reports)}, {"bits.png": lambda path: picture(reports, path)})
    return reports


def measure(config: BitsConfig, seed: int, progress: bool = False) -> dict:
    """What report.json holds of one seed."""
    started = time.perf_counter()
    base = load_plain(config.model).requires_grad_(False)
    alphabet = torch.tensor(tokens_of_words(load_tokenizer(config.model)))
    generator = torch.Generator().manual_seed(seed)
    longest = max(length for ladder in config.kinds.values() for length in ladder.lengths)
    texts = alphabet[torch.randint(len(alphabet), (2, 1, longest + 1), generator=generator)]
    learned = alphabet[torch.randint(len(alphabet), (N_LEARNED,), generator=generator)]
    cells = [
        {"name": name, "size": size, "length": length}
        for name, ladder in config.kinds.items()
        for size in ladder.sizes
        for length in ladder.lengths
    ]
    for cell in tqdm(cells, desc=f"seed {seed}", unit="text", disable=not progress):
        ladder, part = config.kinds[cell["name"]], texts[:, :, : cell["length"] + 1]
        cell |= one_text(base, ladder, cell["size"], *part, steps=config.steps, seed=seed, learned=learned)
        cell["bits"] = cell["recalled"] * math.log2(len(alphabet))
    return {
        "config": {**config.model_dump(), "seed": seed},
        "alphabet": len(alphabet),
        "cells": cells,
        **where("cpu", "transformers"),
        "wall_s": round(time.perf_counter() - started, 1),
    }


def one_text(
    base,
    ladder: Ladder,
    size: int,
    text: torch.Tensor,
    other: torch.Tensor,
    steps: int,
    seed: int,
    learned: torch.Tensor,
) -> dict:
    """Train what a memory keeps to predict `text` (1, length + 1), and count; `base` is left as it was. `learned`: random
    tokens (tokens,) for a compressor that must learn first."""
    started = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        memory = ml.attach(base, ladder.of_size(size, text.shape[1] - 1), name=MEMORY)
        try:
            if ladder.read_back is not None:
                fit(base, memory, learned, ladder.read_back, seed)
            kept = Kept(base, text, reads_back=ladder.read_back is not None)
            kept.learn(base, text, steps, ladder.learning_rate)
            with torch.no_grad():
                loss, recalled = kept.loss(base, text)
                _, other_text = kept.loss(base, other)
        finally:
            ml.detach(base)
    return {
        "bytes": kept.nbytes,
        "recalled": recalled,
        "other_text": other_text,
        "loss": loss.item(),
        "cpu_s": time.process_time() - started,
    }


class Kept:
    """What a memory keeps for one text, as tensors that train; its other parameters stay as they were drawn or learned.

    Args:
        text: (1, length + 1) int64; a reversible memory starts from what its compressor makes of it but the first token.
        reads_back: the memory itself gives the text back; else the base predicts it.

    Attributes:
        tensors: the float tensors of its state; the values of a product-key memory; the rows of task tokens.
        nbytes: bytes of all that is kept.
    """

    def __init__(self, model, text: torch.Tensor, reads_back: bool = False):
        self.memory, self.reads_back = ml.memories(model)[MEMORY], reads_back
        self.prefix, self.state = torch.empty(1, 0, dtype=torch.int64), None
        for parameter in self.memory.parameters():
            parameter.requires_grad_(False)
            if not parameter.any():  # a projection that starts at zero lets nothing through
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if isinstance(self.memory, StatefulMemory):
            compressed = isinstance(self.memory, ml.ReversibleMemory)
            self.state = ml.write(model, text[:, 1:]) if compressed else _nothing_read(model, self.memory)
            self.tensors, self.nbytes = list(_trained(self.state[MEMORY])), self.state.nbytes
            return
        if isinstance(self.memory, ml.TaskTokens):
            self.prefix = self.memory.first_id + torch.arange(self.memory.rows.n_places)[None]
            self.tensors = list(self.memory.rows.input.values())
        else:
            self.tensors = [self.memory.values]
        self.tensors = [tensor.requires_grad_() for tensor in self.tensors]
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)

    def learn(self, model, text: torch.Tensor, steps: int, learning_rate: float) -> None:
        """Train what is kept on `text` with AdamW, its rate on a cosine to 0."""
        optimizer = torch.optim.AdamW(self.tensors, lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model, text)[0].backward()
            optimizer.step()
            schedule.step()

    def loss(self, model, text: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The mean loss (nats) of the tokens of `text` but the first among the words of the base, and how many are right."""
        logits = self._given_back(model, text) if self.reads_back else self._predicted(model, text)
        right = (logits.argmax(-1) == text[0, 1:]).sum().item()
        return F.cross_entropy(logits, text[0, 1:]), right

    def _predicted(self, model, text: torch.Tensor) -> torch.Tensor:
        """(length, vocabulary): the base's logits of the tokens of `text` behind those before them."""
        ids = torch.cat([self.prefix, text[:, :-1]], dim=1)
        reading = {} if self.state is None else {"memory_state": self.state, "write_memory": False}
        output = model(input_ids=ids, use_cache=False, **reading)
        return output.logits[0, self.prefix.shape[1] :, : model.config.vocab_size].float()

    def _given_back(self, model, text: torch.Tensor) -> torch.Tensor:
        """(length, vocabulary): the memory's own scores of the tokens of `text`, which it does not see."""
        length = text.shape[1] - 1
        used = torch.arange(self.memory.schedule.reach)[None] < length
        return self.memory.scores(self.state[MEMORY]["compressed"], used, model)[0, :length]


def _nothing_read(model, memory: StatefulMemory) -> ml.MemoryState:
    """The state of one row before a text, as values of its own."""
    nothing = {
        "embeds": torch.zeros(1, 0, model.config.hidden_size),
        "length": torch.zeros(1, dtype=torch.int64),
    }
    pending = {PENDING: nothing} if memory.schedule.kv == "drop" else {}
    return fresh_state({MEMORY: memory}, 1, pending).detach().clone()


def _trained(fields: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The fields of a state that hold what was read."""
    if "memory" in fields:
        fields["length"].fill_(fields["memory"].shape[1])  # of memory tokens: as if all of them were written
    for name, field in fields.items():
        if name.endswith("normalizer"):
            field.fill_(1)  # of an associative memory: as if something were written everywhere
        elif field.is_floating_point() and not name.startswith(("momentum", "anchor", "conv")):
            yield field.requires_grad_()


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/bits.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure how many bits of a text each kind of memory has room for, over its size."""
    evaluate(load_yaml(config, overrides or [], BitsConfig), out)
    typer.echo(f"wrote {out / 'summary.md'} and what lies beside it")


if __name__ == "__main__":
    typer.run(main)
