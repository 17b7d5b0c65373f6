"""Procedures learned one batch after the other, by task tokens and by a LoRA: what is forgotten of the earlier ones.

The base (`train/procedures_base.py` makes it) does what a definition in the prompt says (`memlayers.tasks.procedures`).
Arms, on the same queries:

| arm | gets |
|---|---|
| base | the name of a procedure, and symbols |
| prompt | its definition too |
| those of the config | the name; they learned it, each batch of procedures once and in the same order |

After each batch all procedures so far are asked for. Answers are what greedy `generate` says, the call of the procedure
included, and right when every symbol is. Routing apart: the first token predicted is the procedure's own. Controls of task
tokens at the end: the memory disabled; the procedure's token given in the prompt; another procedure's token given.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiment import Experiment, ExperimentConfig, Lines, Progress, Record, Table
from memlayers.eval.learners import LEARNERS, Learner, LoraArm, TaskTokensArm, TokenLearner, learn
from memlayers.eval.models import load_plain
from memlayers.eval.statistics import Mean, Share
from memlayers.limits import Count, Steps
from memlayers.loading import load_tokenizer
from memlayers.tasks.procedures import Procedure, ProceduresConfig, ProceduresTask

AnyArm = Annotated[TaskTokensArm | LoraArm, Field(discriminator="type")]


class ProceduresEvalConfig(ExperimentConfig):
    """What is measured.

    Attributes:
        base: folder of a base that `train/procedures_base.py` made.
        batches, batch_procedures: batches of so many procedures come one after the other.
        arms: name -> how it learns them. All see the same uses in the same order.
        steps, batch_size: of the training on a batch of procedures; batch_size uses of them a step.
        queries: of each procedure, with symbols that no training has.
        ask_at_once: queries of one call of `generate`.
    """

    experiment: Literal["procedures"] = "procedures"
    base: str
    batches: Count = 4
    batch_procedures: Count = 16
    arms: dict[str, AnyArm] = Field(min_length=1)
    steps: Steps = 200
    batch_size: Count = 64
    queries: Count = 20
    ask_at_once: Count = 320

    @model_validator(mode="after")
    def _fits_together(self):
        if taken := {"base", "prompt"} & self.arms.keys():
            raise ConfigError(f"arms.{taken.pop()}: this name belongs to an arm that learns nothing")
        return self


def run(config: ProceduresEvalConfig, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a query, arm and time it is asked, and one an arm with its parameters.

    Raises `FileNotFoundError` for a base that is not there, `ConfigError` for more procedures than the base has left,
    `ValueError` where training diverges.
    """
    yield from ProceduresRun(config, seed, progress).records()


class ProceduresRun:
    """One seed.

    Attributes:
        task: the base's procedures.
        batches: of procedures.
        queries: of each procedure, by name.
    """

    def __init__(self, config: ProceduresEvalConfig, seed: int, progress: Progress) -> None:
        self.config, self.seed, self.progress = config, seed, progress
        self.base = Path(config.base)
        if not (self.base / "procedures.json").is_file():
            raise FileNotFoundError(
                f"base: no base with procedures in {self.base}; make it: python train/procedures_base.py "
                f"--out {self.base}"
            )
        settings = ProceduresConfig(**json.loads((self.base / "procedures.json").read_text(encoding="utf-8")))
        self.task = ProceduresTask(settings, load_tokenizer(self.base))
        size = config.batch_procedures
        try:
            self.procedures = self.task.new(size * config.batches, seed)
        except ValueError as error:
            raise ConfigError(f"batches: {error} by this base") from None
        self.batches = [self.procedures[n * size : (n + 1) * size] for n in range(config.batches)]
        rng = random.Random(f"memlayers:queries:{seed}")
        self.queries = {
            p.name: [self.task.draw(rng, "eval") for _ in range(config.queries)] for p in self.procedures
        }

    def records(self) -> Iterator[Record]:
        """All arms."""
        model = load_plain(self.base)
        yield from self.ask("base", model, self.procedures)
        yield from self.ask("prompt", model, self.procedures, definition=True)
        for arm in self.config.arms:
            yield from self._measure(arm)

    def _measure(self, arm: str) -> Iterator[Record]:
        """An arm through all batches, and its controls. A query asked again has what was lost since its own batch."""
        settings, model = self.config.arms[arm], load_plain(self.base)
        own: dict[tuple, Record] = {}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            learner: Learner = LEARNERS[settings.type](settings, model, self.task)
            seconds, kept = 0.0, True
            for number, batch in enumerate(self.batches, start=1):
                before = {name: x.clone() for name, x in model.state_dict().items()}
                earlier = [p for each in self.batches[: number - 1] for p in each]
                rng, started = random.Random(f"memlayers:uses:{self.seed}:{number}"), time.process_time()
                bar = functools.partial(self.progress, desc=f"{arm}, {number}")
                learn(learner, batch, earlier, self.config, rng, bar)
                seconds += time.process_time() - started
                now = model.state_dict()
                kept &= all(torch.equal(now[name], x) for name, x in before.items())
                found = list(self.ask(arm, model, [*earlier, *batch], after=number, learner=learner))
                own |= {(r["unit"], r["item"]): r for r in found if r["batch"] == number}
                for record in found:
                    then = own[record["unit"], record["item"]]
                    drops = {
                        "accuracy_drop": int(then["correct"]) - int(record["correct"]),
                        "routing_drop": int(then["routed"]) - int(record["routed"]),
                    }
                    yield {**record, **(drops if record["batch"] < number else {})}
        summary = {"parameters": sum(x.numel() for x in model.parameters() if x.requires_grad)}
        if isinstance(learner, TokenLearner):
            summary["parameters"] = sum(row.numel() for row in learner.memory.parameters())
            summary["earlier_identical"] = kept
            yield from self._controls(arm, learner)
        yield {
            "arm": arm,
            "unit": "seed",
            "learning_rate": settings.learning_rate,
            "cpu_s": seconds,
            **summary,
        }

    def _controls(self, arm: str, learner: TokenLearner) -> Iterator[Record]:
        """The memory disabled; the right token given; the token of the next procedure given."""
        procedures, memory = self.procedures, learner.memory
        with ml.disabled(learner.model):
            found = list(self.ask(f"{arm}: memory off", learner.model, procedures))
        yield from found
        own = {p.name: memory.id_of(p.name) for p in procedures}
        others = {p.name: own[after.name] for p, after in zip(procedures, [*procedures[1:], procedures[0]])}
        yield from self.ask(f"{arm}: own token given", learner.model, procedures, given=own)
        yield from self.ask(f"{arm}: another's token given", learner.model, procedures, given=others)

    def ask(
        self,
        arm: str,
        model,
        procedures: Sequence[Procedure],
        after: int = 0,
        definition: bool = False,
        learner: Learner | None = None,
        given: dict[str, int] | None = None,
    ) -> Iterator[Record]:
        """What `model` answers to the queries of `procedures`.

        definition: of the procedure, in the prompt. learner: whose first token is to be the right one. given: name -> a
        token behind the prompt."""
        queries = [
            (p, number, symbols) for p in procedures for number, symbols in enumerate(self.queries[p.name])
        ]
        uses = [self.task.use(p, symbols, definition) for p, _, symbols in queries]
        prompts = [[*use.prompt, *([given[p.name]] if given else [])] for (p, *_), use in zip(queries, uses)]
        batch_of = {p.name: number for number, batch in enumerate(self.batches, start=1) for p in batch}
        predictions = [
            ids
            for start in self.progress(range(0, len(prompts), self.config.ask_at_once), desc=arm)
            for ids in self._generate(model, prompts[start : start + self.config.ask_at_once])
        ]
        for (procedure, number, symbols), use, ids in zip(queries, uses, predictions, strict=True):
            first = use.words[0] if learner is None else learner.target(procedure, use)[1][0]
            yield {
                "arm": arm,
                "after": after,
                "batch": batch_of[procedure.name],
                "unit": procedure.name,
                "item": number,
                "query": " ".join(symbols),
                "prediction": self._text(ids),
                "correct": self.task.answer_in(ids) == use.answer[1:-1],
                "routed": ids[0] == first,
                "last": after in (0, len(self.batches)),
                "learned": after > 0,
            }

    def _generate(self, model, prompts: Sequence[list[int]]) -> list[list[int]]:
        """What greedy decoding adds to prompts of one length."""
        ids = torch.tensor(prompts)
        n_new = self.task.config.length + 4  # two words, ":" and ";"
        model.eval()
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n_new, "do_sample": False}
        return model.generate(ids, **options)[:, ids.shape[1] :].tolist()

    def _text(self, ids: Sequence[int]) -> str:
        """Words, and ids of task tokens as numbers."""
        known = len(self.task.tokenizer)
        return " ".join(self.task.tokenizer.decode([i]) if i < known else f"<{i}>" for i in ids)


EXPERIMENT = Experiment(
    title="Procedures learned one batch after the other",
    about="Shares of answers that are right in every symbol, of greedy `generate`, the call of the procedure included. prompt: "
    "the definition stands in the prompt. Routing: the first token is the procedure's own (a LoRA: its first token is right). "
    "Drop: what a procedure had right after its own batch less what it has now.",
    config=ProceduresEvalConfig,
    run=run,
    keys=("arm", "after", "batch"),
    unit="procedure",
    metrics=(
        Share(),
        Share("routed", "routing"),
        Mean("accuracy_drop", "drop of earlier ones", digits=4),
        Mean("routing_drop", "drop of their routing", digits=4),
        Mean("parameters", "parameters", digits=0),
        Mean("learning_rate", "learning rate", digits=4),
        Mean("cpu_s", "CPU s", digits=0),
        Share("earlier_identical", "base and earlier rows as before"),
    ),
    views=(
        Table(
            title="After all batches",
            rows=("arm",),
            metrics=("accuracy", "routing", "drop of earlier ones", "drop of their routing"),
            where={"last": (True,)},
        ),
        Table(
            title="Training",
            text="Base and earlier rows as before: bit for bit, after each batch.",
            rows=("arm",),
            metrics=("parameters", "learning rate", "CPU s", "base and earlier rows as before"),
        ),
        Table(
            title="{arm}: accuracy, by batch",
            by=("arm",),
            rows=("after",),
            cols="batch",
            metrics=("accuracy",),
            where={"learned": (True,)},
        ),
        Table(
            title="{arm}: what is forgotten",
            by=("arm",),
            rows=("after",),
            metrics=("routing", "drop of earlier ones", "drop of their routing"),
            where={"learned": (True,)},
        ),
        Lines(
            title="Accuracy on each batch, after each later one",
            file="procedures",
            panels=("arm",),
            x="after",
            hue="batch",
            metrics=("accuracy",),
            where={"learned": (True,)},
        ),
    ),
)
