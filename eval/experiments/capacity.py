"""How many tokens a LoRA adapter remembers, over its rank.

A text of random tokens, which nothing but the adapter can know, is written into it by `ml.write`. Remembered are the tokens
that are the most likely ones behind the tokens before them in their segment, less those that the base alone gets right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field

import memlayers as ml
from memlayers.eval.experiment import Experiment, ExperimentConfig, Lines, Progress, Record, Table, Unique
from memlayers.eval.models import load_plain
from memlayers.eval.statistics import Mean, Share
from memlayers.eval.texts import random_texts, tokens_of_words
from memlayers.limits import Tokens, Width
from memlayers.loading import load_tokenizer
from memlayers.writing import of_text

MEMORY = "notes"


class CapacityConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint.
        ranks: each in the place of the memory's r, with the same lora_alpha / r.
        lengths: tokens of a text.
        memory: targets, and how it is written: steps, rate, segments.
    """

    experiment: Literal["capacity"] = "capacity"
    model: str
    ranks: Annotated[list[Width], Unique] = Field([1, 2, 4, 8, 16, 32, 64], min_length=1)
    lengths: Annotated[list[Tokens], Unique] = Field([256, 1024], min_length=1)
    memory: ml.LoRAMemoryConfig = ml.LoRAMemoryConfig()

    def of_rank(self, rank: int) -> ml.LoRAMemoryConfig:
        """The memory of this rank."""
        scaling = self.memory.lora_alpha / self.memory.r
        return self.memory.model_copy(update={"r": rank, "lora_alpha": scaling * rank})


def run(config: CapacityConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """Three records a rank and length: the text with its adapter, by the base alone, and another text with the adapter."""
    base, alphabet = load_plain(config.model), tokens_of_words(load_tokenizer(config.model))
    cells = [(rank, length) for rank in config.ranks for length in config.lengths]
    for rank, length in progress(cells, desc=f"seed {seed}", unit="text"):
        text, other = random_texts(alphabet, length, torch.Generator().manual_seed(seed))
        found = one_text(base, config.of_rank(rank), text, other, seed)
        at = {"rank": rank, "length": length, "tokens": length, "unit": "text", "chance": 1 / len(alphabet)}
        for arm, (right, loss) in found["arms"].items():
            yield {**at, "arm": arm, "right": sum(right), "loss": loss}
        parameters = found["parameters"]
        more = sum(found["arms"]["adapter"][0]) - sum(found["arms"]["base"][0])
        yield {
            **at,
            "remembered": more,
            "share": more / length,
            "tokens_per_parameter": more / parameters,
            "parameters": parameters,
            "cpu_s": found["cpu_s"],
        }


def one_text(base, memory: ml.LoRAMemoryConfig, text: torch.Tensor, other: torch.Tensor, seed: int) -> dict:
    """Write a text (1, length + 1) into a fresh adapter of `base` and read; `base` is left as it was.

    Returns {arms: {adapter, base, other text: (right, loss)}, parameters, cpu_s}, see `read`.
    """
    length = memory.writer.segment_length
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ml.attach(base, memory, name=MEMORY)
    try:
        started = time.process_time()
        state = ml.write(base, text)
        seconds = time.process_time() - started
        arms = {"adapter": read(base, text, state, length), "other text": read(base, other, state, length)}
        with ml.disabled(base):
            arms["base"] = read(base, text, None, length)
    finally:
        ml.detach(base)
    return {"arms": arms, "parameters": sum(x.numel() for x in state[MEMORY].values()), "cpu_s": seconds}


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


EXPERIMENT = Experiment(
    title="Tokens that a LoRA adapter remembers, over its rank",
    about="Random tokens, written into a fresh adapter. Remembered: tokens that are the most likely ones behind those before "
    "them in their segment, less what the base alone gets right; loss in nats a token. Control: another random text that "
    "the same adapter reads.",
    config=CapacityConfig,
    run=run,
    keys=("arm", "rank", "length"),
    unit="text",
    metrics=(
        Share("right", "share of tokens right", of="tokens"),
        Mean("right", "tokens right", digits=1),
        Mean("loss", "loss"),
        Mean("remembered", "remembered", digits=1),
        Mean("share", "share of the text"),
        Mean("tokens_per_parameter", "tokens a parameter", digits=4),
        Mean("cpu_s", "CPU s", digits=1),
    ),
    controls=("other text",),
    views=(
        Table(
            title="{length} tokens",
            by=("length",),
            rows=("rank", "parameters"),
            metrics=("remembered", "share of the text", "tokens a parameter", "CPU s"),
        ),
        Table(
            title="Tokens right, and controls", rows=("length", "rank"), cols="arm", metrics=("tokens right",)
        ),
        Table(title="Loss in nats a token", rows=("length", "rank"), cols="arm", metrics=("loss",)),
        Lines(
            title="Tokens remembered",
            file="capacity",
            x="rank",
            hue="length",
            metrics=("remembered",),
            log=True,
        ),
    ),
)
