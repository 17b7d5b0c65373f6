"""Which arm and control is asked under which condition, on the same items; what cannot be asked, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.core.model import max_positions, reach, stateful
from memlayers.eval.experiment import Progress
from memlayers.eval.models import NO_MEMORY, ModelConfig, stages
from memlayers.eval.probes import STATE_CONTROLS, Prober
from memlayers.tasks import Sample

INDICES_PER_LENGTH = 1_000_000
"""Random streams of items of one length."""
MOST_KEPT = 2**28
"""Tokens of all texts of one length, which are kept while they are asked: 2 GB."""


def check_kept(n_texts: int, length: int) -> None:
    """Raise ConfigError where so many texts of `length` tokens are more than MOST_KEPT."""
    if n_texts * length > MOST_KEPT:
        raise ConfigError(
            f"n: {n_texts:,} texts of {length:,} tokens are more than {MOST_KEPT:,} tokens; lower it or the lengths"
        )


@dataclass(frozen=True)
class Items:
    """The haystacks of one cell, in a fixed order.

    Attributes:
        keys: of their records, such as the suite and the number of pairs.
        conditions: that they are asked under.
        length: tokens of context, question and answer.
        samples: with their needles.
        empty: the same items without the needles that are asked for.
        not_run: why there are none, else None.
    """

    keys: dict
    conditions: Sequence[str]
    length: int
    samples: list[Sample] = field(default_factory=list)
    empty: list[Sample] = field(default_factory=list)
    not_run: str | None = None


@dataclass(frozen=True)
class Answers:
    """What one arm or control answered to all items of a cell under one condition, or why it was not asked.

    Attributes:
        predictions: one list a haystack, see the prober.
        state_bytes: of the state of one haystack, under memory_only.
    """

    items: Items
    condition: str
    arm: str
    predictions: list | None = None
    not_run: str | None = None
    state_bytes: int | None = None


@dataclass(frozen=True)
class _Job:
    """One reading of a cell: arms that read the same input under several conditions are asked once."""

    stage: str
    items: Items
    arms: tuple[str, ...]
    conditions: tuple[str, ...]
    kind: str  # whole | truncated | disabled | alone | memory | empty | empty memory
    reason: str | None = None


def ask_all(
    config: ModelConfig,
    models,
    trained,
    window: int,
    cells: Sequence[Items],
    progress: Progress,
    prober: type[Prober] = Prober,
) -> Iterator[Answers]:
    """Every arm and control of `config` on every cell, model after model.

    Args:
        config: with `arms` and `controls`.
        trained: the trained model, loaded.
        window: tokens that the truncated arms see.
    """
    jobs = [job for items in cells for job in _jobs(config, models, trained, items)]
    bar = progress(total=sum(len(job.arms) for job in jobs if job.reason is None), desc="cells", unit="cell")
    yield from (
        answer for job in jobs if job.reason is not None for answer in _answers(job, reason=job.reason)
    )
    runnable = [job for job in jobs if job.reason is None]
    for stage, model in stages(models, {job.stage for job in runnable}, trained):
        asking = prober(model, models.tokenizer(), config.batch_size, config.margin)
        for job in runnable:
            if job.stage != stage:
                continue
            try:
                yield from _answers(job, _ask(asking, job, window), asking.state_bytes)
            except ValueError as error:
                if "positions" not in str(error):
                    raise
                yield from _answers(job, reason=str(error))
            bar.update(len(job.arms))
        del asking, model
    bar.close()


def _jobs(config: ModelConfig, models, trained, items: Items) -> Iterator[_Job]:
    arms, controls, conditions = config.arms, config.controls, tuple(items.conditions)
    too_long = _too_long(trained, items.length)

    def job(stage: str, names: tuple[str, ...], where: tuple[str, ...], kind: str, reason: str | None = None):
        return _Job(stage, items, names, where, kind, items.not_run or models.missing.get(stage) or reason)

    if "base" in arms:
        yield job("base", ("base",), conditions, "whole", too_long)
    if "base_truncated" in arms:
        yield job("base", ("base_truncated",), conditions, "truncated")
    if "memory_disabled" in arms:
        reason = NO_MEMORY if models.missing.get("untrained") == NO_MEMORY else None
        yield job("trained", ("memory_disabled",), conditions, "disabled", reason)
    if "question_only" in controls:
        yield job("trained", ("question_only",), conditions, "alone")
    for condition in conditions:
        reason = _why_not(trained, condition, items.length)
        memory = condition == "memory_only"
        for stage in ("trained", "untrained"):
            swaps = tuple(c for c in STATE_CONTROLS if c in controls) if stage == "trained" else ()
            names = (stage,) if stage in arms else ()
            if memory and len(items.samples) == 1 and "shuffled_memory" in swaps:
                swaps = tuple(c for c in swaps if c != "shuffled_memory")
                alone = "there is no second haystack to exchange with"
                yield job("trained", ("shuffled_memory",), (condition,), "memory", alone)
            names += swaps if memory else ()
            if swaps and not memory:
                none = f"{condition} keeps no state to exchange"
                yield _Job("trained", items, swaps, (condition,), "memory", none)
            if names:
                yield job(stage, names, (condition,), "memory" if memory else "whole", reason)
        if "no_needle" in controls:
            yield job("trained", ("no_needle",), (condition,), "empty memory" if memory else "empty", reason)


def _ask(prober: Prober, job: _Job, window: int) -> list[list]:
    """The predictions of each arm of a job."""
    samples = job.items.empty if job.kind.startswith("empty") else job.items.samples
    if job.kind.endswith("memory"):
        return prober.from_memory(samples, [arm if arm in STATE_CONTROLS else None for arm in job.arms])
    if job.kind == "alone":
        return [prober.question_only(samples)]
    if job.kind == "disabled":
        with ml.disabled(prober.model):
            return [prober.in_one_call(samples, last=window)]
    return [prober.in_one_call(samples, last=window if job.kind == "truncated" else None)]


def _answers(job: _Job, answers=None, state_bytes: int = 0, reason: str | None = None) -> Iterator[Answers]:
    for number, arm in enumerate(job.arms):
        for condition in job.conditions:
            predictions = None if answers is None else answers[number]
            size = state_bytes if answers is not None and job.kind == "memory" and arm == job.stage else None
            yield Answers(job.items, condition, arm, predictions, reason, size)


def _why_not(trained, condition: str, length: int) -> str | None:
    """Why the measured model cannot be asked under `condition` at this length; None if it can."""
    windowed, attention = reach(trained) is not None, ml.window(trained)
    if condition == "full_context":
        if windowed and length > attention:
            return f"{length} tokens do not fit in attention, which reaches {attention} tokens with memory"
        return _too_long(trained, length)
    if not stateful(trained):
        return f"{condition} needs a memory that keeps a state, and this model has none"
    if not windowed and condition == "sliding_window":
        return "sliding_window needs a memory with segment_length or sliding_window; here attention reaches the whole text"
    return None if windowed else _too_long(trained, length)


def _too_long(trained, length: int) -> str | None:
    positions = max_positions(trained)
    if positions is not None and length > positions:
        return f"{length} tokens are longer than the model's {positions} positions"
    return None
