"""`evaluate`: all arms and controls of all suites on the same items, and the files that tell of it."""

from __future__ import annotations

import contextlib
import gc
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import memlayers as ml
from memlayers.config import ConfigError, Strict, validate
from memlayers.core.model import max_positions
from memlayers.eval import perplexity
from memlayers.eval.config import (
    ARMS,
    CONTROLS,
    EvalConfig,
    FactsSuiteConfig,
    MqarSuiteConfig,
    SuiteConfig,
    load_config,
)
from memlayers.eval.models import IN_MEMORY, FromCheckpoint, InMemory, describe
from memlayers.eval.output import check_output
from memlayers.eval.plan import Plan
from memlayers.eval.regimes import Asker, Predictions
from memlayers.eval.report import build_report, write_report
from memlayers.eval.suites import Items, make_items
from memlayers.eval.suites.facts import FactsSuite
from memlayers.eval.suites.mqar import MqarSuite
from memlayers.eval.suites.scoring import exact, substring

STAGES = ("trained", "base", "untrained")

__all__ = ["evaluate", "evaluate_model", "load_config"]


def evaluate(config: EvalConfig, output_dir: str | Path, progress: bool = True) -> dict:
    """Evaluates the checkpoint of `config` and writes the report into `output_dir`.

    Files: report.json, samples.jsonl, report.md and one picture a suite, each whole or not at all.
    Returns what report.json holds. Raises `FileNotFoundError` for a missing checkpoint, `ValueError` when the
    tokenizer cannot spell the needles, `FileExistsError` where `output_dir` holds such files of others.
    """
    check_output(output_dir)
    source = FromCheckpoint(config)
    return _evaluate(source, source.tokenizer(), config, output_dir, progress)


def evaluate_model(
    model,
    tokenizer,
    suites: Mapping[str, SuiteConfig | FactsSuiteConfig | MqarSuiteConfig | dict],
    base=None,
    output_dir: str | Path | None = None,
    progress: bool = False,
    **fields,
) -> dict:
    """Evaluates a model in memory.

    model: wrapped (or plain) causal LM. suites: name -> `SuiteConfig`, `FactsSuiteConfig`,
    `MqarSuiteConfig` or the mapping a YAML file would hold.
    base: the plain model of the base arms; default: `model` with its memory off, which is the original base
    only if training left it frozen. output_dir: where to write the files; None writes nothing. fields: other
    fields of `EvalConfig`, such as `controls=[...]`, `batch_size=8`, `seed=1`.
    Returns the report, with the answers themselves under `samples` when nothing is written.
    """
    blocks = {
        name: suite.model_dump() if isinstance(suite, Strict) else dict(suite)
        for name, suite in suites.items()
    }
    config = validate(EvalConfig, {"model": IN_MEMORY, "suites": blocks, **fields})
    was_training = model.training
    try:
        return _evaluate(InMemory(model, base, config.seed), tokenizer, config, output_dir, progress)
    finally:
        model.train(was_training)


def _evaluate(source, tokenizer, config: EvalConfig, output_dir: str | Path | None, progress: bool) -> dict:
    started = time.perf_counter()
    model = source.trained()
    window, where = config.window or ml.window(model), describe(model)
    if not window and (config.haystacks or config.mqar or config.perplexity):
        raise ValueError(
            "the model's config names no limit of positions: give window= for the arms that are cut."
        )
    positions = max_positions(model)
    if positions is not None and window > positions:
        raise ConfigError(f"window: {window} tokens are more than the model's {positions} positions.")
    suites = {
        name: make_items(suite, tokenizer, window, config.seed) for name, suite in config.haystacks.items()
    }
    facts = {
        name: FactsSuite(name, suite, config, tokenizer, source.missing, source.base_is_model)
        for name, suite in config.facts.items()
    }
    mqar = {
        name: MqarSuite(name, suite, config, tokenizer, model, window, source.missing)
        for name, suite in config.mqar.items()
    }
    others = [*facts.values(), *mqar.values()]
    plan = Plan(config, suites, model, window, source.missing)
    skipped = {(s.suite, s.regime, s.length, s.name): s.reason for s in plan.skipped}
    records: dict[tuple, list[dict]] = defaultdict(list)

    prose, perplexities, n_prose = None, {}, 0
    if config.perplexity is not None:
        prose = perplexity.unseen_prose(config.perplexity, tokenizer, window)
        n_prose = len(prose) * len(ARMS)
    n_answers = sum(each.n_answers for each in (*plan.jobs, *others))
    with _bar(n_answers + n_prose, progress) as advance:
        for stage in STAGES:
            jobs = [job for job in plan.jobs if job.stage == stage]
            measured = prose is not None and stage not in source.missing
            asked = [each for each in others if each.wanted(stage)]
            if jobs or asked or measured:
                model = model if stage == "trained" else getattr(source, stage)()
                asker = Asker(model, tokenizer, config.batch_size, config.margin, advance)
            for job in jobs:
                try:
                    answers = job.ask(asker)
                except ValueError as error:
                    if "positions" not in str(error):
                        raise
                    for regime in job.regimes:
                        for name in job.names:
                            skipped[job.suite, regime, job.items.length, name] = str(error)
                    continue
                for name, predictions in zip(job.names, answers):
                    scored = _score(job.items, predictions, tokenizer)
                    for regime in job.regimes:
                        key = (job.suite, regime, job.items.length, name)
                        records[key] = [
                            {"suite": key[0], "regime": regime, **row, "arm": name} for row in scored
                        ]
            for each in asked:
                each.ask(stage, asker)
            if measured:
                perplexities |= perplexity.measure(
                    model, stage, prose, window, config.batch_size, config.seed, advance
                )
            model = asker = None
            gc.collect()

    lengths = {name: [items.length for items in per_length] for name, per_length in suites.items()}
    report = build_report(config, window, lengths, records, skipped)
    if facts:
        report["facts"] = {name: each.report() for name, each in facts.items()}
    if mqar:
        report["mqar"] = {name: each.report() for name, each in mqar.items()}
    if perplexities:
        report["perplexity"] = {arm: perplexities[arm] for arm in ARMS if arm in perplexities}
    report["versions"] = {**_versions(), **where}
    report["wall_s"] = round(time.perf_counter() - started, 2)
    samples = [row for key in sorted(records, key=_order) for row in records[key]]
    samples += [row for each in others for row in each.rows()]
    if output_dir is None:
        return {**report, "samples": samples}
    write_report(report, samples, Path(output_dir))
    return report


def _score(items: Items, predictions: Predictions, tokenizer) -> list[dict]:
    """One row a question: what was asked and said, and whether it is right."""
    rows = []
    for haystack, (sample, texts, depths) in enumerate(zip(items.samples, predictions, items.depths)):
        for question, text, depth in zip(sample.questions, texts, depths):
            rows.append(
                {
                    "length": items.length,
                    "depth": depth,
                    "haystack": haystack,
                    "question": tokenizer.decode(question.ids, clean_up_tokenization_spaces=False),
                    "prediction": text,
                    "answers": list(question.answers),
                    "correct": exact(text, question.answers, question.kind),
                    "substring": substring(text, question.answers),
                }
            )
    return rows


def _order(key: tuple) -> tuple:
    suite, regime, length, name = key
    return suite, regime, length, (*ARMS, *CONTROLS).index(name)


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "scipy")
    return {
        "memlayers": ml.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda n: bar.advance(task, n)
