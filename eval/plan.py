"""What is asked of which model: every arm and control of every suite, regime and length, run or not run and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import memlayers as ml
from memlayers.core.model import max_positions, reach, stateful
from memlayers.eval.config import EvalConfig
from memlayers.eval.regimes import Asker, Predictions
from memlayers.eval.suites import Items

STATE_CONTROLS = ("shuffled_memory", "zeroed_memory")


@dataclass(frozen=True)
class Job:
    """Answers of one model for one suite and length.

    stage: the model: "trained", "base" or "untrained". regimes: the regimes whose cells the answers fill
    (arms that read the same input in every regime are asked once). names: arms or controls, in the order in
    which `ask` returns their predictions. n_answers: for the progress bar.
    """

    stage: str
    suite: str
    regimes: tuple[str, ...]
    items: Items
    names: tuple[str, ...]
    ask: Callable[[Asker], list[Predictions]]

    @property
    def n_answers(self) -> int:
        return self.items.n_questions * len(self.names)


@dataclass(frozen=True)
class Skipped:
    """An arm or control that cannot be run in a cell, and why."""

    suite: str
    regime: str
    length: int
    name: str
    reason: str


class Plan:
    """Jobs and skipped cells of an evaluation.

    config: arms, controls and regimes. suites: name -> items per length. trained: the model that is measured.
    window: tokens the cut arms see. missing: stages without a model -> reason.
    """

    def __init__(
        self,
        config: EvalConfig,
        suites: dict[str, list[Items]],
        trained,
        window: int,
        missing: dict[str, str],
    ) -> None:
        self.config, self.window, self.missing = config, window, missing
        self.positions, self.remembers = max_positions(trained), bool(stateful(trained))
        self.windowed = reach(trained) is not None
        self.reach = ml.window(trained)
        self.jobs: list[Job] = []
        self.skipped: list[Skipped] = []
        for suite, per_length in suites.items():
            for items in per_length:
                self._cut_and_whole(suite, items)
                for regime in config.suites[suite].regimes:
                    self._with_memory(suite, regime, items)

    def _cut_and_whole(self, suite: str, items: Items) -> None:
        """Arms and controls that do not depend on the regime."""

        def cut(asker: Asker) -> list[Predictions]:
            return [asker.in_one_call(items.samples, last=window)]

        def alone(asker: Asker) -> list[Predictions]:
            return [asker.question_only(items.samples)]

        regimes, window, whole = self._regimes(suite), self.window, self._too_long(items.length)
        if "base" in self.config.arms:
            self._add(
                "base", suite, regimes, items, ("base",), whole, lambda a: [a.in_one_call(items.samples)]
            )
        if "base_cut" in self.config.arms:
            self._add("base", suite, regimes, items, ("base_cut",), None, cut)
        if "memory_off" in self.config.arms:
            reason = None if self.missing.get("untrained") != NO_MEMORY else NO_MEMORY
            self._add("trained", suite, regimes, items, ("memory_off",), reason, lambda a: _disabled(a, cut))
        if "question_only" in self.config.controls:
            self._add("trained", suite, regimes, items, ("question_only",), None, alone)

    def _with_memory(self, suite: str, regime: str, items: Items) -> None:
        arms, controls, reason = self.config.arms, self.config.controls, self._reason(regime, items)
        for stage in ("trained", "untrained"):
            swaps = tuple(c for c in STATE_CONTROLS if c in controls) if stage == "trained" else ()
            names = (stage,) if stage in arms else ()
            for control in swaps if regime != "D" else ():
                self._skip(suite, regime, items, control, f"regime {regime} keeps no state to exchange")
            if regime == "D" and len(items.samples) == 1 and "shuffled_memory" in swaps:
                self._skip(
                    suite, regime, items, "shuffled_memory", "there is no second haystack to exchange with"
                )
                swaps = swaps[1:]
            names += swaps if regime == "D" else ()
            if names:
                self._add(stage, suite, (regime,), items, names, reason, _ask(regime, items.samples, names))
        if "no_needle" in controls:
            self._add(
                "trained",
                suite,
                (regime,),
                items,
                ("no_needle",),
                reason,
                _ask(regime, items.empty, ("no_needle",)),
            )

    def _reason(self, regime: str, items: Items) -> str | None:
        """Why the measured model cannot be asked in `regime` at this length; None if it can."""
        if regime == "F":
            if self.windowed and items.length > self.reach:
                return f"{items.length} tokens do not fit in attention, which reaches {self.reach} tokens with memory"
            return self._too_long(items.length)
        if not self.remembers:
            return f"regime {regime} needs a memory that keeps a state, and this model has none"
        if not self.windowed and regime == "W":
            return "regime W needs a memory with segment_length or sliding_window; here attention reaches the whole text"
        return None if self.windowed else self._too_long(items.length)

    def _too_long(self, length: int) -> str | None:
        if self.positions is not None and length > self.positions:
            return f"{length} tokens are longer than the model's {self.positions} positions"
        return None

    def _regimes(self, suite: str) -> tuple[str, ...]:
        return tuple(self.config.suites[suite].regimes)

    def _add(self, stage, suite, regimes, items, names, reason, ask) -> None:
        reason = items.not_run or self.missing.get(stage) or reason
        if reason is None:
            self.jobs.append(Job(stage, suite, tuple(regimes), items, names, ask))
            return
        for regime in regimes:
            for name in names:
                self._skip(suite, regime, items, name, reason)

    def _skip(self, suite: str, regime: str, items: Items, name: str, reason: str) -> None:
        self.skipped.append(Skipped(suite, regime, items.length, name, reason))


NO_MEMORY = "this model has no memory"


def _ask(regime: str, samples, names: tuple[str, ...]) -> Callable[[Asker], list[Predictions]]:
    if regime == "D":
        changes = [name if name in STATE_CONTROLS else None for name in names]
        return lambda asker: asker.from_memory(samples, changes)
    return lambda asker: [asker.in_one_call(samples)]


def _disabled(asker: Asker, ask: Callable[[Asker], list[Predictions]]) -> list[Predictions]:
    with ml.disabled(asker.model):
        return ask(asker)
