"""Procedures learned one batch after the other, by task tokens and by a LoRA: what is forgotten of the earlier ones.

    python train/procedures_base.py --out runs/procedures_base
    python -m memlayers.eval.procedures --config configs/eval/procedures.yaml --out runs/procedures

The base does what a definition in the prompt says (`memlayers.tasks.procedures`). Arms, on the same queries:

| arm | gets |
|---|---|
| base | the name of a procedure, and symbols |
| prompt | its definition too |
| those of the config | the name; they learned it, each batch of procedures once and in the same order |

After each batch all procedures so far are asked for. Answers are what greedy `generate` says, the call of the procedure
included, and right when every symbol is. Routing apart: the first token said is the procedure's own. Controls of task
tokens at the end: the memory off; the procedure's token given in the prompt; another procedure's token given.

OUT gets, for each seed, report.json, samples.jsonl, report.md and procedures.png, and then summary.md and procedures.png
over all the seeds that lie there. A seed that has its report.json is not measured again.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm.auto import tqdm

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval import procedures_report
from memlayers.eval.models import load_plain
from memlayers.eval.output import check_output, read_report
from memlayers.eval.procedures_arms import LEARNERS, Learner, TokenLearner, learn
from memlayers.eval.procedures_config import ProceduresEvalConfig
from memlayers.eval.speed.timing import where
from memlayers.loading import load_tokenizer
from memlayers.tasks.procedures import Procedure, ProceduresConfig, ProceduresTask
from memlayers.yaml_config import load_yaml


def evaluate(config: ProceduresEvalConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed that is not there yet and write the files; the reports.

    Raises `FileNotFoundError` for a base that is not there, `ConfigError` for more procedures than the base has left,
    `ValueError` where training diverges or `output_dir` has a report of another config.
    """
    output_dir, reports = Path(output_dir), []
    for seed in config.seeds:
        folder = output_dir / f"seed{seed}"
        report = _measured(folder / "report.json", config)
        if report is None:
            check_output(folder)
            report, samples = Trial(config, seed, progress).report()
            procedures_report.write(report, samples, folder)
        reports.append(report)
    procedures_report.write_summary(output_dir)
    return reports


def _measured(path: Path, config: ProceduresEvalConfig) -> dict | None:
    """The report at `path`, or None where there is none."""
    if not path.is_file():
        return None
    report = read_report(path)
    theirs = {k: v for k, v in report["config"].items() if k not in ("seed", "seeds")}
    if theirs != config.model_dump(mode="json", exclude={"seeds"}):
        raise ValueError(f"{path}: measured with another config; give another folder with --out")
    return report


class Trial:
    """One seed.

    Attributes: `task`; `batches`: of procedures; `rows`: a line of samples.jsonl for each query, arm and time it is
    asked; `found`: what else the report has of each arm.
    """

    def __init__(self, config: ProceduresEvalConfig, seed: int, progress: bool = False) -> None:
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
        self.rows: list[dict] = []
        self.found: dict[str, dict] = {}

    def report(self) -> tuple[dict, list[dict]]:
        """What report.json holds, and the rows of samples.jsonl."""
        started = time.perf_counter()
        model = load_plain(self.base)
        self.ask("base", model, self.procedures)
        self.ask("prompt", model, self.procedures, definition=True)
        for arm in self.config.arms:
            self._measure(arm)
        report = {
            "config": {**self.config.model_dump(mode="json"), "seed": self.seed},
            "procedures": self.task.config.model_dump(),
            "base_parameters": model.num_parameters(),
            "arms": self.found,
            **procedures_report.measured(self.rows, self.config.resamples, self.seed),
            **where("cpu", "transformers"),
            "wall_s": round(time.perf_counter() - started, 1),
        }
        return report, self.rows

    def _measure(self, arm: str) -> None:
        """An arm through all batches, and its controls."""
        settings, model = self.config.arms[arm], load_plain(self.base)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            learner: Learner = LEARNERS[settings.type](settings, model, self.task)
            seconds, kept = 0.0, True
            for number, batch in enumerate(self.batches, start=1):
                before = {name: x.clone() for name, x in model.state_dict().items()}
                earlier = [p for each in self.batches[: number - 1] for p in each]
                rng, started = random.Random(f"memlayers:uses:{self.seed}:{number}"), time.process_time()
                learn(
                    learner,
                    batch,
                    earlier,
                    self.config,
                    rng,
                    functools.partial(self._bar, name=f"{arm}, {number}"),
                )
                seconds += time.process_time() - started
                now = model.state_dict()
                kept &= all(torch.equal(now[name], x) for name, x in before.items())
                self.ask(arm, model, [*earlier, *batch], after=number, learner=learner)
        self.found[arm] = {
            "parameters": sum(x.numel() for x in model.parameters() if x.requires_grad),
            "train_cpu_s": seconds,
        }
        if isinstance(learner, TokenLearner):
            everything = sum(row.numel() for row in learner.memory.parameters())
            self.found[arm] |= {"parameters": everything, "earlier_rows_and_base_identical": kept}
            self._controls(arm, learner)

    def _controls(self, arm: str, learner: TokenLearner) -> None:
        """The memory off; the right token given; the token of the next procedure given."""
        procedures, memory = self.procedures, learner.memory
        with ml.disabled(learner.model):
            self.ask(f"{arm}: memory off", learner.model, procedures)
        own = {p.name: memory.id_of(p.name) for p in procedures}
        others = {p.name: own[after.name] for p, after in zip(procedures, [*procedures[1:], procedures[0]])}
        self.ask(f"{arm}: own token given", learner.model, procedures, given=own)
        self.ask(f"{arm}: another's token given", learner.model, procedures, given=others)

    def ask(
        self,
        arm: str,
        model,
        procedures: Sequence[Procedure],
        after: int = 0,
        definition: bool = False,
        learner: Learner | None = None,
        given: dict[str, int] | None = None,
    ) -> None:
        """Note in `rows` what `model` answers to the queries of `procedures`.

        definition: of the procedure, in the prompt. learner: whose first token is to be the right one. given: name -> a
        token behind the prompt."""
        asked = [(p, symbols) for p in procedures for symbols in self.queries[p.name]]
        uses = [self.task.use(p, symbols, definition) for p, symbols in asked]
        prompts = [[*use.prompt, *([given[p.name]] if given else [])] for (p, _), use in zip(asked, uses)]
        batch_of = {p.name: number for number, batch in enumerate(self.batches, start=1) for p in batch}
        said = [
            ids
            for start in self._bar(range(0, len(prompts), self.config.ask_at_once), arm)
            for ids in self._say(model, prompts[start : start + self.config.ask_at_once])
        ]
        for (procedure, symbols), use, ids in zip(asked, uses, said, strict=True):
            first = use.words[0] if learner is None else learner.target(procedure, use)[1][0]
            self.rows.append(
                {
                    "seed": self.seed,
                    "arm": arm,
                    "after": after,
                    "batch": batch_of[procedure.name],
                    "procedure": procedure.name,
                    "query": " ".join(symbols),
                    "said": self._text(ids),
                    "correct": self.task.answer_in(ids) == use.answer[1:-1],
                    "routed": ids[0] == first,
                }
            )

    def _say(self, model, prompts: Sequence[list[int]]) -> list[list[int]]:
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

    def _bar(self, items, name: str):
        return tqdm(items, desc=f"seed {self.seed}: {name}", disable=not self.progress, leave=False)


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/procedures.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure what is forgotten of procedures when others are learned."""
    evaluate(load_yaml(config, overrides or [], ProceduresEvalConfig), out)
    typer.echo(f"wrote {out / 'summary.md'} and what lies beside it")


if __name__ == "__main__":
    typer.run(main)
