"""How many bits of a text each kind of memory can hold, over its size.

A text of random tokens, each of an alphabet equally likely, cannot be guessed: every token of it that is recalled is
worth log2(alphabet) bits. The alphabet is the tokens that spell the objects of the fictional facts, since a checkpoint
has tokens that it never learned and cannot say. What a memory keeps for one text (its state; the table or the rows of a
memory in parameters) is trained, on the frozen model, to predict the text; recalled are the tokens that are then the
most likely ones behind those before them. Short and long texts are tried, and the most bits count. A reversible memory
is read in two ways: by the base, as memory tokens are, and back by its own compressor, which must have learned other
random texts first.

This asks what a memory has room for on that model, not what a trained memory writes there by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.core.memory import StatefulMemory, fresh_state
from memlayers.core.state import PENDING
from memlayers.eval.compressor import CompressorTraining, train_compressor
from memlayers.eval.experiment import Experiment, ExperimentConfig, Lines, Progress, Record, Table, Unique
from memlayers.eval.models import load_plain
from memlayers.eval.statistics import Mean, Share
from memlayers.eval.texts import random_texts, tokens_of_words
from memlayers.kinds import AnyMemoryConfig
from memlayers.limits import Rate, Steps, Tokens, Width
from memlayers.loading import load_tokenizer

MEMORY = "held"
N_LEARNED = 100_000
"""Random tokens that a compressor learns on."""


class SizeSweep(Strict):
    """One kind of memory in several sizes.

    Attributes:
        memory: all its other fields. The `ratios` of a reversible memory follow from the text, which is one segment.
        field: the field that sizes set; `names` takes as many names.
        sizes: its values.
        lengths: tokens of a text, one after the other; the most bits count.
        learning_rate: of AdamW.
        read_back: count what a reversible memory itself gives back, after this training of its compressor on other
            random texts; None: what the base predicts.
    """

    memory: AnyMemoryConfig
    field: str
    sizes: Annotated[list[Width], Unique] = Field(min_length=1)
    lengths: Annotated[list[Tokens], Unique] = Field([64, 256], min_length=1)
    learning_rate: Rate = 1e-2
    read_back: CompressorTraining | None = None

    @model_validator(mode="after")
    def _fits_together(self):
        if self.read_back is not None and self.memory.type != "reversible":
            raise ConfigError(
                f"read_back: only a reversible memory gives text back, not {self.memory.type!r}"
            )
        for size in self.sizes:
            self.of_size(size, self.lengths[0])
        return self

    def of_size(self, size: int, length: int) -> ml.MemoryConfig:
        """The memory of this size for a text of `length` tokens. Raises `ConfigError` where its kind does not take it."""
        fields = self.memory.model_dump()
        fields[self.field] = [f"task{i}" for i in range(size)] if self.field == "names" else size
        if self.memory.type == "reversible":
            fields["ratios"] = [math.ceil(length / fields["n_tokens"])]
        return ml.parse_memory_config(fields)


class BitsConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint, frozen.
        steps: of AdamW on what a memory keeps for the text.
        kinds: name in the report to the kind and its sizes.
    """

    experiment: Literal["bits"] = "bits"
    model: str
    steps: Steps = 400
    kinds: dict[str, SizeSweep] = Field(min_length=1)


def run(config: BitsConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """Two records a text, of its own tokens and of another's, and one a size for the most bits of any length."""
    base = load_plain(config.model).requires_grad_(False)
    alphabet = tokens_of_words(load_tokenizer(config.model))
    generator = torch.Generator().manual_seed(seed)
    longest = max(length for sweep in config.kinds.values() for length in sweep.lengths)
    texts = random_texts(alphabet, longest, generator)
    learned = torch.tensor(alphabet)[torch.randint(len(alphabet), (N_LEARNED,), generator=generator)]
    sizes = [(name, size) for name, sweep in config.kinds.items() for size in sweep.sizes]
    for name, size in progress(sizes, desc=f"seed {seed}", unit="size"):
        sweep, best = config.kinds[name], None
        for length in sweep.lengths:
            text, other = texts[:, :, : length + 1]
            cell = one_text(base, sweep, size, text, other, config.steps, seed, learned)
            bits = cell["recalled"] * math.log2(len(alphabet))
            best = cell | {"bits": bits} if best is None or bits > best["bits"] else best
            at = {"arm": name, "size": size, "length": length, "unit": "text", "chance": 1 / len(alphabet)}
            for text_name, right in (("own", cell.pop("recalled")), ("other", cell.pop("other_text"))):
                yield {**at, "text": text_name, "recalled": right, "tokens": length, **cell}
        at = {"arm": name, "size": size, "bytes": best["bytes"], "unit": "text", "field": sweep.field}
        yield {**at, "bits": best["bits"], "bits_per_byte": best["bits"] / best["bytes"]}


def one_text(
    base,
    sweep: SizeSweep,
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
        memory = ml.attach(base, sweep.of_size(size, text.shape[1] - 1), name=MEMORY)
        try:
            if sweep.read_back is not None:
                train_compressor(base, memory, learned, sweep.read_back, seed)
            contents = MemoryContents(base, text, reads_back=sweep.read_back is not None)
            contents.learn(base, text, steps, sweep.learning_rate)
            with torch.no_grad():
                loss, recalled = contents.loss(base, text)
                _, other_text = contents.loss(base, other)
        finally:
            ml.detach(base)
    return {
        "bytes": contents.nbytes,
        "recalled": recalled,
        "other_text": other_text,
        "loss": loss.item(),
        "cpu_s": time.process_time() - started,
    }


class MemoryContents:
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
            self.state = ml.write(model, text[:, 1:]) if compressed else _empty_state(model, self.memory)
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
        logits = self._reconstructed(model, text) if self.reads_back else self._predicted(model, text)
        right = (logits.argmax(-1) == text[0, 1:]).sum().item()
        return F.cross_entropy(logits, text[0, 1:]), right

    def _predicted(self, model, text: torch.Tensor) -> torch.Tensor:
        """(length, vocabulary): the base's logits of the tokens of `text` behind those before them."""
        ids = torch.cat([self.prefix, text[:, :-1]], dim=1)
        reading = {} if self.state is None else {"memory_state": self.state, "write_memory": False}
        output = model(input_ids=ids, use_cache=False, **reading)
        return output.logits[0, self.prefix.shape[1] :, : model.config.vocab_size].float()

    def _reconstructed(self, model, text: torch.Tensor) -> torch.Tensor:
        """(length, vocabulary): the memory's own scores of the tokens of `text`, which it does not see."""
        length = text.shape[1] - 1
        used = torch.arange(self.memory.schedule.reach)[None] < length
        return self.memory.scores(self.state[MEMORY]["compressed"], used, model)[0, :length]


def _empty_state(model, memory: StatefulMemory) -> ml.MemoryState:
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


OWN = {"text": ("own",)}
EXPERIMENT = Experiment(
    title="Bits that a memory has room for",
    about="Texts of random tokens, each worth log2(alphabet) bits; what a memory keeps for a text is trained to predict it, "
    "on the frozen model. Recalled are the tokens that are the most likely ones behind those before them. Bits: the most "
    "of any length. Bytes: of what is kept, as it is saved. Control: another text read with the same memory.",
    config=BitsConfig,
    run=run,
    keys=("arm", "size", "length", "text"),
    unit="text",
    metrics=(
        Share("recalled", "share of tokens", of="tokens"),
        Mean("bits", "bits", digits=1),
        Mean("bits_per_byte", "bits a byte"),
        Mean("bytes", "bytes", digits=0),
        Mean("recalled", "tokens recalled", digits=1),
        Mean("loss", "loss (nats)"),
    ),
    compared="text",
    controls=("other",),
    views=(
        Table(title="Most bits", rows=("arm", "size", "bytes"), metrics=("bits", "bits a byte")),
        Table(
            title="{arm}: tokens recalled, by tokens of the text",
            by=("arm",),
            rows=("size",),
            cols="length",
            metrics=("tokens recalled",),
            where=OWN,
        ),
        Table(
            title="Control: tokens of another text",
            rows=("arm", "size"),
            cols="length",
            metrics=("tokens recalled",),
            where={"text": ("other",)},
        ),
        Lines(title="Bits over bytes", file="bits", x="bytes", hue="arm", metrics=("bits",), log=True),
        Lines(
            title="Bits over tokens",
            file="bits_of_tokens",
            x="size",
            hue="arm",
            metrics=("bits",),
            where={"field": ("n_tokens", "names")},
            log=True,
        ),
    ),
)
