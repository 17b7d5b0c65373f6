"""A bank of LoRA shards beside one LoRA of as many parameters: routing, closed-book recall, deletion.

    python -m memlayers.eval.bank --config configs/eval/lora_bank.yaml --out runs/lora_bank

Documents are fictional, a subject each, and every document is a shard of a group of its own. Questions are asked without
any context (regime P). Arms, on the same questions:

| arm | reads |
|---|---|
| base | nothing: the memory is off |
| top-k | the k shards that the router chooses among all, mixed |
| own shard | the shard of the document, which only the asker of an exam knows |
| another's shard | the shard of the next document: what it gets right it did not get from the document |
| one LoRA | one adapter of the parameters of all shards, trained on all documents with as many steps as all shards |

Then documents are deleted: the bank forgets them, the one LoRA is trained again on the others, with as many steps for
each document as before. Strangers are subjects of no document: right answers about them are chance.

OUT gets, for each seed, report.json, samples.jsonl, report.md and recall.png, and then summary.md and recall.png over all
the seeds that lie there.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm

import memlayers as ml
from memlayers.eval import bank_report
from memlayers.eval.bank_config import BankEvalConfig
from memlayers.eval.bank_items import PROMPTS, Asked, Documents
from memlayers.eval.models import load_plain
from memlayers.eval.output import check_output
from memlayers.eval.regimes import Asker
from memlayers.eval.speed.timing import where
from memlayers.loading import load_tokenizer
from memlayers.tasks import Sample
from memlayers.tasks.facts import said_object
from memlayers.yaml_config import load_yaml

MEMORY = "notes"


def evaluate(config: BankEvalConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed and write the files; the reports.

    Raises `FileNotFoundError` for a checkpoint that is not there, `ValueError` when its tokenizer cannot spell the facts
    or training diverges, `ConfigError` for targets that the model does not have.
    """
    output_dir, reports = Path(output_dir), []
    for seed in config.seeds:
        check_output(output_dir / f"seed{seed}")
        report, samples = Trial(config, seed, progress).report()
        bank_report.write(report, samples, output_dir / f"seed{seed}")
        reports.append(report)
    bank_report.write_summary(output_dir)
    return reports


class Trial:
    """One seed.

    Attributes: `documents`; `gone`: ids of those that are deleted; `rows`: a line of samples.jsonl for each question and
    arm; `seconds`: seconds of the CPU by what they were spent on.
    """

    def __init__(self, config: BankEvalConfig, seed: int, progress: bool = False) -> None:
        self.config, self.seed, self.progress = config, seed, progress
        self.tokenizer = load_tokenizer(config.model)
        self.documents = Documents(self.tokenizer, config.n_documents, config.facts_per_document, seed)
        ids = sorted(self.documents.texts)
        self.gone = set(random.Random(f"memlayers:deleted:{seed}").sample(ids, config.n_deleted))
        self.rows: list[dict] = []
        self.seconds: dict[str, list[float]] = {}
        self.askers = {"shard": self._asker(config.memory), "one": self._asker(config.one)}

    def report(self) -> tuple[dict, list[dict]]:
        """What report.json holds, and the rows of samples.jsonl."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = self._measure(Path(folder))
        report = {
            "config": {**self.config.model_dump(), "seed": self.seed},
            "chance": self.documents.chance,
            "documents": self._sizes(),
            "parameters": {name: n_parameters(asker.model) for name, asker in self.askers.items()},
            **bank_report.measured(self.rows, self.config.top_k, self.config.resamples, self.seed),
            **found,
            "seconds": {name: {"n": len(s), "mean": sum(s) / len(s)} for name, s in self.seconds.items()},
            **where("cpu", "transformers"),
            "wall_s": round(time.perf_counter() - started, 1),
        }
        return report, self.rows

    def _measure(self, folder: Path) -> dict:
        """All arms; what is no share of right answers."""
        config, documents = self.config, self.documents
        asked = [*documents.questions, *documents.strangers]
        bank = self.bank(folder / "bank")
        self._ask_base(asked)
        for top_k in config.top_k:
            self.ask(f"top-{top_k}", bank, asked, top_k)
        self.ask("own shard", bank, documents.questions, 1, {d: [d] for d in documents.texts})
        self.ask("another's shard", bank, documents.questions, 1, shuffled(documents.texts))
        routing = {"before": self.routing(bank), "temperatures": self._temperatures(folder / "bank")}

        one = self.one_lora(folder / "one", documents.texts)
        self.ask("one LoRA", one, asked, 1)

        before = files_of(bank.path)
        for document in sorted(self.gone):
            with self._timed("forget a document: bank"):
                bank.forget(document)
        after = files_of(bank.path)
        for top_k in config.top_k:
            self.ask(f"top-{top_k}, after deletion", bank, documents.questions, top_k)
        kept = [item for item in documents.questions if item.document not in self.gone]
        self.ask("own shard, after deletion", bank, kept, 1, {d: [d] for d in documents.texts})
        left = {d: text for d, text in documents.texts.items() if d not in self.gone}
        again = self.one_lora(folder / "again", left)
        self.ask("one LoRA, after deletion", again, documents.questions, 1)
        routing["after"] = self.routing(bank, kept)
        return {
            "routing": routing,
            "deletion": {
                "documents": sorted(self.gone),
                "files_of_kept_shards_identical": all(before[name] == after[name] for name in after),
                "answers_of_kept_shards_identical": self._said("own shard")
                == self._said("own shard, after deletion"),
                "shards_left": len(bank.list()),
            },
        }

    # the two sides
    def bank(self, path: Path) -> ml.LoRABank:
        """A shard a document, each of a group of its own."""
        config = self.config.bank.model_copy(update={"seed": self.seed})
        bank = self._create(path, "shard", config)
        for document, text in self._bar(self.documents.texts.items(), "shards"):
            with self._timed("add a shard"):
                bank.add({document: text}, group=document, name=document)
        return bank

    def one_lora(self, path: Path, texts: dict[str, str]) -> ml.LoRABank:
        """One adapter on all `texts`, with the steps that shards of them would take together."""
        config = self.config.bank.model_copy(
            update={
                "seed": self.seed,
                "steps": self.config.bank.steps * len(texts),
                "learning_rate": self.config.one_learning_rate,
            }
        )
        bank = self._create(path, "one", config)
        with self._timed(f"train one LoRA on {len(texts)} documents"):
            bank.add(texts, group="all", name="all", progress=self.progress)
        return bank

    def _create(self, path: Path, kind: str, config: ml.LoRABankConfig) -> ml.LoRABank:
        model = self.askers[kind].model
        return ml.LoRABank.create(path, model, self.tokenizer, memory=MEMORY, config=config)

    def _asker(self, memory: ml.LoRAMemoryConfig) -> Asker:
        model = load_plain(self.config.model)
        ml.attach(model, memory, name=MEMORY)
        return Asker(model, self.tokenizer, self.config.batch_size, margin=0)

    # asking
    def ask(self, arm: str, bank: ml.LoRABank, asked: Sequence[Asked], top_k: int, readable=None) -> None:
        """Note in `rows` what `bank` answers.

        readable: document -> groups that its asker may read; default: all of them.
        """
        every = sorted({manifest.group for manifest in bank.list()})
        asker = next(asker for asker in self.askers.values() if asker.model is bank.model)

        def said(part: list[Asked], samples: list[Sample]) -> list[str]:
            groups = [every if readable is None else readable[item.document] for item in part]
            state = bank.read([item.text for item in part], groups=groups, top_k=top_k)
            return asker.of_state(state, samples)

        self._note(arm, asked, said)

    def _ask_base(self, asked: Sequence[Asked]) -> None:
        asker = self.askers["shard"]
        with ml.disabled(asker.model):
            self._note("base", asked, lambda part, samples: [text for (text,) in asker.in_one_call(samples)])

    def _note(self, arm: str, asked: Sequence[Asked], said) -> None:
        """Ask in batches of questions of about the same length, and keep a row a question."""
        order = sorted(range(len(asked)), key=lambda at: len(asked[at].question.ids))
        answers = [""] * len(asked)
        for start in self._bar(range(0, len(order), self.config.batch_size), arm):
            places = order[start : start + self.config.batch_size]
            part = [asked[at] for at in places]
            samples = [Sample([], [item.question], [0.0], at, 0) for at, item in zip(places, part)]
            for at, text in zip(places, said(part, samples)):
                answers[at] = said_object(text)
        self.rows += [self._row(arm, item, answer) for item, answer in zip(asked, answers)]

    def _row(self, arm: str, item: Asked, answer: str) -> dict:
        known = item.document in self.documents.texts
        return {
            "seed": self.seed,
            "arm": arm,
            "document": item.document,
            "part": ("deleted" if item.document in self.gone else "kept") if known else "stranger",
            "prompts": item.prompts,
            "relation": item.fact.relation,
            "question": item.text,
            "prediction": answer,
            "answer": item.fact.object,
            "correct": answer == item.fact.object,
        }

    def _said(self, arm: str) -> list[str]:
        """What an arm answers about the documents that are kept."""
        return [row["prediction"] for row in self.rows if row["arm"] == arm and row["part"] == "kept"]

    def routing(self, bank: ml.LoRABank, asked: Sequence[Asked] | None = None) -> dict:
        """Share of questions whose own shard the router has first, and among its first three."""
        asked = self.documents.questions if asked is None else asked
        every = sorted({manifest.group for manifest in bank.list()})
        routes = bank.route([item.text for item in asked], groups=[every] * len(asked), top_k=3)
        found = {}
        for prompts in PROMPTS:
            chosen = [
                (i.document, [name for name, _ in r]) for i, r in zip(asked, routes) if i.prompts == prompts
            ]
            found[prompts] = {
                f"top-{k}": bank_report.share([(own, own in names[:k]) for own, names in chosen])
                for k in (1, 3)
            }
        return found

    def _temperatures(self, path: Path) -> dict:
        """Temperature -> cell of the held-out prompts, of the same shards mixed with other weights."""
        top_k = next((k for k in self.config.top_k if k > 1), 1)
        bank = ml.LoRABank.open(path, self.askers["shard"].model, self.tokenizer, memory=MEMORY)
        asked = [item for item in self.documents.questions if item.prompts == "held_out"]
        found, rows = {}, self.rows
        for temperature in self.config.temperatures:
            bank.config = bank.config.model_copy(update={"temperature": temperature})
            self.rows = []  # these are no arm
            self.ask(f"temperature {temperature}", bank, asked, top_k)
            found[str(temperature)] = bank_report.cell(self.rows)
        self.rows = rows
        return {"top_k": top_k, "cells": found}

    # small things
    def _sizes(self) -> dict:
        tokens = [len(self.tokenizer(text).input_ids) for text in self.documents.texts.values()]
        return {"n": len(tokens), "tokens": sum(tokens), "longest": max(tokens)}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.process_time() - started)

    def _bar(self, items, name: str):
        return tqdm(items, desc=f"seed {self.seed}: {name}", disable=not self.progress, leave=False)


def shuffled(texts: Sequence[str]) -> dict[str, list[str]]:
    """Each document to the group of the next one, going round: nobody gets the own."""
    ids = sorted(texts)
    return {document: [ids[(at + 1) % len(ids)]] for at, document in enumerate(ids)}


def files_of(path: Path) -> dict[str, str]:
    """sha256 of every file of a bank's shards, by path."""
    files = (file for file in sorted((path / "shards").rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def n_parameters(model) -> int:
    """Numbers in one adapter of the LoRA memory."""
    return sum(x.numel() for x in ml.memories(model)[MEMORY].new_state(1).values())


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/lora_bank.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure a bank of LoRA shards beside one LoRA of as many parameters."""
    evaluate(load_yaml(config, overrides or [], BankEvalConfig), out)
    typer.echo(f"wrote {out / 'summary.md'} and what lies beside it")


if __name__ == "__main__":
    typer.run(main)
