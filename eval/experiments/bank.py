"""A bank of LoRA shards beside one LoRA of as many parameters: routing, closed-book recall, deletion.

Documents are fictional, a subject each, and every document is a shard of a group of its own. Questions are asked without
any context. Arms, on the same questions:

| arm | reads |
|---|---|
| base | nothing: the memory is off |
| top-k | the k shards that the router chooses among all, mixed |
| own shard | the shard of the document, which only the asker of an exam knows |
| another's shard | the shard of the next document: what it gets right it did not get from the document |
| one LoRA | one adapter of the parameters of all shards, trained on all documents with as many steps as all shards |

Then documents are deleted: the bank forgets them, the one LoRA is trained again on the others, with as many steps for
each document as before. Strangers are subjects of no document: right answers about them are chance.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.documents import PROMPTS, Documents, Probe
from memlayers.eval.experiment import (
    Bars,
    Experiment,
    ExperimentConfig,
    Gains,
    Progress,
    Record,
    Table,
    Unique,
)
from memlayers.eval.models import load_plain
from memlayers.eval.probes import Prober
from memlayers.eval.statistics import Mean, Share
from memlayers.files import file_checksum
from memlayers.limits import Count, Rate, Scale
from memlayers.loading import load_tokenizer
from memlayers.tasks import Sample
from memlayers.tasks.facts import said_object

MEMORY = "notes"
ONE, OWN = "one LoRA", "own shard"


class BankEvalConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint.
        n_documents, facts_per_document: each document is a shard.
        n_deleted: documents that are deleted.
        memory: of a shard. The one LoRA has n_documents times its r, and the same lora_alpha / r.
        bank: how shards are trained and found; its `seed` gives way to `seeds`.
        one_learning_rate: of the one LoRA, whose best is another than a shard's.
        top_k: shards that are mixed.
        temperatures: held-out prompts are also asked with these in place of the bank's, with the first top_k above 1.
        batch_size: questions of a batch.
    """

    experiment: Literal["bank"] = "bank"
    model: str
    n_documents: Count = Field(40, ge=2)
    facts_per_document: int = Field(3, ge=1, le=5)
    n_deleted: Count = 10
    memory: ml.LoRAMemoryConfig = ml.LoRAMemoryConfig()
    bank: ml.LoRABankConfig = ml.LoRABankConfig()
    one_learning_rate: Rate = 5e-3
    top_k: Annotated[list[Count], Unique] = Field([1, 2, 3], min_length=1)
    temperatures: Annotated[list[Scale], Unique] = Field([])
    batch_size: Count = 120

    @model_validator(mode="after")
    def _fits_together(self):
        if self.n_deleted >= self.n_documents:
            raise ConfigError(f"n_deleted: {self.n_deleted} of {self.n_documents} documents leave none")
        if self.temperatures and max(self.top_k) == 1:
            raise ConfigError("temperatures: with a single shard there is nothing to weigh; put 2 into top_k")
        return self

    @property
    def one(self) -> ml.LoRAMemoryConfig:
        """The memory of the one LoRA."""
        n = self.n_documents
        return self.memory.model_copy(
            update={"r": n * self.memory.r, "lora_alpha": n * self.memory.lora_alpha}
        )


def run(config: BankEvalConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a question and arm, a question and place in the routing, a document's shard, and a step that took time.

    Raises `FileNotFoundError` for a checkpoint that is not there, `ValueError` when its tokenizer cannot spell the facts
    or training diverges, `ConfigError` for targets that the model does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield from BankRun(config, seed, progress).records(Path(folder))


class BankRun:
    """One seed.

    Attributes:
        documents: texts and questions.
        deleted: ids of the documents that are deleted.
        seconds: (step, seconds of the CPU) in the order in which they were spent.
    """

    def __init__(self, config: BankEvalConfig, seed: int, progress: Progress) -> None:
        self.config, self.seed, self.progress = config, seed, progress
        self.tokenizer = load_tokenizer(config.model)
        self.documents = Documents(self.tokenizer, config.n_documents, config.facts_per_document, seed)
        ids = sorted(self.documents.texts)
        self.deleted = set(random.Random(f"memlayers:deleted:{seed}").sample(ids, config.n_deleted))
        self.seconds: list[tuple[str, float]] = []
        self.probers = {"shard": self._prober(config.memory), "one": self._prober(config.one)}

    def records(self, folder: Path) -> Iterator[Record]:
        """All arms, before and after deletion."""
        config, documents = self.config, self.documents
        everything, own = [*documents.questions, *documents.strangers], {d: [d] for d in documents.texts}
        yield from self.ask_base(everything)
        bank = self.bank(folder / "bank")
        for top_k in config.top_k:
            yield from self.ask(f"top-{top_k}", bank, everything, top_k)
        before = list(self.ask(OWN, bank, documents.questions, 1, own))
        yield from before
        yield from self.ask("another's shard", bank, documents.questions, 1, shuffled(documents.texts))
        yield from self.routing(bank, documents.questions, "before")
        yield from self.ask_temperatures(folder / "bank")
        one = self.one_lora(folder / "one", documents.texts)
        yield from self.ask(ONE, one, everything, 1)

        files = files_of(bank.path)
        for document in sorted(self.deleted):
            with self._timed("forget a document: bank"):
                bank.forget(document)
        left = files_of(bank.path)
        for top_k in config.top_k:
            yield from self.ask(f"top-{top_k}, after deletion", bank, documents.questions, top_k)
        kept = [probe for probe in documents.questions if probe.document not in self.deleted]
        after = list(self.ask(f"{OWN}, after deletion", bank, kept, 1, own))
        yield from after
        yield from self.ask_again(folder / "again")
        yield from self.routing(bank, kept, "after")
        same = {record["question"]: record["prediction"] for record in before}
        for manifest in bank.list():
            (document,) = (d for d in own if d == manifest.group)
            mine = [name for name in left if f"/{manifest.name}/" in f"/{name}"] or list(left)
            said = [r for r in after if r["unit"] == document]
            yield {
                "unit": document,
                "files_identical": all(files.get(name) == left[name] for name in mine),
                "answers_identical": all(same[r["question"]] == r["prediction"] for r in said),
            }
        for name, prober in self.probers.items():
            yield {"adapter": name, "unit": "seed", "parameters": n_parameters(prober.model)}
        for number, (step, seconds) in enumerate(self.seconds):
            yield {"step": step, "unit": number, "cpu_s": seconds}

    # the two sides
    def bank(self, path: Path) -> ml.LoRABank:
        """A shard a document, each of a group of its own."""
        bank = self._create(path, "shard", self.config.bank.model_copy(update={"seed": self.seed}))
        for document, text in self.progress(self.documents.texts.items(), desc="shards"):
            with self._timed("add a shard"):
                bank.add({document: text}, group=document, name=document)
        return bank

    def one_lora(self, path: Path, texts: dict[str, str]) -> ml.LoRABank:
        """One adapter on all `texts`, with the steps that shards of them would take together."""
        steps, rate = self.config.bank.steps * len(texts), self.config.one_learning_rate
        fields = {"seed": self.seed, "steps": steps, "learning_rate": rate}
        bank = self._create(path, "one", self.config.bank.model_copy(update=fields))
        with self._timed(f"train one LoRA on {len(texts)} documents"):
            bank.add(texts, group="all", name="all", progress=False)
        return bank

    def _create(self, path: Path, kind: str, config: ml.LoRABankConfig) -> ml.LoRABank:
        model = self.probers[kind].model
        return ml.LoRABank.create(path, model, self.tokenizer, memory=MEMORY, config=config)

    def _prober(self, memory: ml.LoRAMemoryConfig) -> Prober:
        model = load_plain(self.config.model)
        ml.attach(model, memory, name=MEMORY)
        return Prober(model, self.tokenizer, self.config.batch_size, margin=0)

    # asking
    def ask(
        self, arm: str, bank: ml.LoRABank, probes: Sequence[Probe], top_k: int, readable=None
    ) -> Iterator[Record]:
        """What `bank` answers. readable: document -> groups that its asker may read; default: all of them."""
        every = sorted({manifest.group for manifest in bank.list()})
        prober = next(prober for prober in self.probers.values() if prober.model is bank.model)

        def answer(part: list[Probe], samples: list[Sample]) -> list[str]:
            groups = [every if readable is None else readable[probe.document] for probe in part]
            state = bank.read([probe.text for probe in part], groups=groups, top_k=top_k)
            return prober.of_state(state, samples)

        yield from self._in_batches(arm, probes, answer)

    def ask_base(self, probes: Sequence[Probe]) -> Iterator[Record]:
        """What the base answers."""
        prober = self.probers["shard"]
        with ml.disabled(prober.model):
            found = list(
                self._in_batches("base", probes, lambda _, s: [text for (text,) in prober.in_one_call(s)])
            )
        yield from found

    def ask_again(self, path: Path) -> Iterator[Record]:
        """What one LoRA answers that was trained again, on the documents that stay."""
        left = {d: text for d, text in self.documents.texts.items() if d not in self.deleted}
        yield from self.ask(f"{ONE}, after deletion", self.one_lora(path, left), self.documents.questions, 1)

    def ask_temperatures(self, path: Path) -> Iterator[Record]:
        """Held-out prompts, of the same shards mixed with other weights."""
        top_k = next((k for k in self.config.top_k if k > 1), 1)
        bank = ml.LoRABank.open(path, self.probers["shard"].model, self.tokenizer, memory=MEMORY)
        probes = [probe for probe in self.documents.questions if probe.prompts == "held_out"]
        for temperature in self.config.temperatures:
            bank.config = bank.config.model_copy(update={"temperature": temperature})
            for record in self.ask(f"top-{top_k}, other weights", bank, probes, top_k):
                yield {**record, "asked": "with other weights", "temperature": temperature}

    def _in_batches(self, arm: str, probes: Sequence[Probe], answer) -> Iterator[Record]:
        """Ask in batches of questions of about the same length; a record a question, in their order."""
        order = sorted(range(len(probes)), key=lambda at: len(probes[at].question.ids))
        answers = [""] * len(probes)
        for start in self.progress(range(0, len(order), self.config.batch_size), desc=arm):
            places = order[start : start + self.config.batch_size]
            part = [probes[at] for at in places]
            samples = [Sample([], [probe.question], [0.0], at, 0) for at, probe in zip(places, part)]
            for at, text in zip(places, answer(part, samples)):
                answers[at] = said_object(text)
        yield from (
            self._record(arm, at, probe, text) for at, (probe, text) in enumerate(zip(probes, answers))
        )

    def _record(self, arm: str, item: int, probe: Probe, text: str) -> Record:
        known = probe.document in self.documents.texts
        part = ("deleted" if probe.document in self.deleted else "kept") if known else "stranger"
        return {
            "arm": arm,
            "part": part,
            "asked": "after deletion" if "after deletion" in arm else "before",
            "about": "a document" if known else "a stranger",
            "prompts": probe.prompts,
            "unit": probe.document,
            "item": probe.text,
            "relation": probe.fact.relation,
            "question": probe.text,
            "prediction": text,
            "answer": probe.fact.object,
            "correct": text == probe.fact.object,
            "chance": self.documents.chance,
        }

    def routing(self, bank: ml.LoRABank, probes: Sequence[Probe], when: str) -> Iterator[Record]:
        """Whether the router has a question's own shard first, and among its first three."""
        every = sorted({manifest.group for manifest in bank.list()})
        routes = bank.route([probe.text for probe in probes], groups=[every] * len(probes), top_k=3)
        for probe, route in zip(probes, routes):
            names = [name for name, _ in route]
            for first in (1, 3):
                at = {"when": when, "shards": len(every), "first": first, "prompts": probe.prompts}
                yield {
                    **at,
                    "unit": probe.document,
                    "item": probe.text,
                    "routed": probe.document in names[:first],
                }

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds.append((step, time.process_time() - started))


def shuffled(texts: Sequence[str]) -> dict[str, list[str]]:
    """Each document to the group of the next one, going round: nobody gets the own."""
    ids = sorted(texts)
    return {document: [ids[(at + 1) % len(ids)]] for at, document in enumerate(ids)}


def files_of(path: Path) -> dict[str, str]:
    """The checksum of every file of a bank's shards, by path."""
    files = (file for file in sorted((path / "shards").rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file_checksum(file) for file in files}


def n_parameters(model) -> int:
    """Numbers in one adapter of the LoRA memory."""
    return sum(x.numel() for x in ml.memories(model)[MEMORY].new_state(1).values())


RECALL = {"about": ("a document",), "asked": ("before",)}
EXPERIMENT = Experiment(
    title="A bank of LoRA shards beside one LoRA",
    about="Greedy answers without any context, exact. Prompts: those of the documents (trained), and others (held_out). The "
    "one LoRA has the parameters and the steps of all shards together.",
    config=BankEvalConfig,
    run=run,
    keys=("arm", "part", "prompts", "temperature"),
    unit="document",
    metrics=(
        Share(),
        Share("routed", "own shard found"),
        Mean("cpu_s", "CPU s", digits=2),
        Mean("parameters", "parameters", digits=0),
        Share("files_identical", "files byte for byte as before"),
        Share("answers_identical", "answers as before"),
        Mean("chance", "guess"),
    ),
    controls=("base", "another's shard"),
    views=(
        Table(
            title="Recall",
            rows=("arm",),
            cols="prompts",
            metrics=("accuracy",),
            where={**RECALL, "prompts": PROMPTS},
        ),
        Gains(
            title="Less the one LoRA, on the same questions, {prompts} prompts",
            by=("prompts",),
            rows=(),
            over=ONE,
            metrics=("accuracy",),
            where=RECALL,
        ),
        Table(
            title="False recall, about subjects of no document",
            rows=("arm",),
            metrics=("accuracy", "guess"),
            where={"about": ("a stranger",)},
        ),
        Table(
            title="Routing", rows=("when", "shards", "first"), cols="prompts", metrics=("own shard found",)
        ),
        Table(title="Other weights of the same shards", rows=("arm", "temperature"), metrics=("accuracy",)),
        Table(
            title="Deletion: questions about documents {part}",
            text="The one LoRA is trained again on the documents that stay, with as many steps for each.",
            by=("part",),
            rows=("arm",),
            cols="prompts",
            metrics=("accuracy",),
            where={"part": ("kept", "deleted")},
        ),
        Table(
            title="Shards that stay after deletion",
            rows=(),
            metrics=("files byte for byte as before", "answers as before"),
        ),
        Table(title="Parameters of an adapter", rows=("adapter",), metrics=("parameters",)),
        Table(title="Seconds of the CPU, each", rows=("step",), metrics=("CPU s",)),
        Bars(
            title="Recall",
            file="recall",
            panels=("asked", "part"),
            x="arm",
            hue="prompts",
            metrics=("accuracy",),
            where={"part": ("kept", "deleted"), "asked": ("before", "after deletion")},
        ),
    ),
)
