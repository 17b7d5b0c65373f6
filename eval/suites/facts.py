"""The closed-book suite: facts asked without any context, of every arm (regime P).

| metric | prompts | right when |
|---|---|---|
| efficacy | those trained, about the first batch | the object is named, exactly, greedy |
| paraphrase | held out of training, about the first batch | the same |
| later_efficacy, later_paraphrase | the same about the batch that is learned later | the same |
| locality | all, about subjects of no batch | the answer is the one the original base gives |

The control `shuffled_facts` counts the answers to the efficacy prompts against another fact of the same relation:
what stays is chance and a liking for some objects. Prompts of one fact are not independent, so the intervals are
Wilson's for as many items as there are facts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.config import EvalConfig, FactsSuiteConfig
from memlayers.eval.output import read_report
from memlayers.eval.plan import NO_MEMORY
from memlayers.eval.regimes import Asker
from memlayers.eval.statistics import wilson
from memlayers.tasks import Fact, FactsTask, Question, Sample
from memlayers.tasks.facts import said_object

FACT_ARMS = ("base", "memory_off", "untrained", "trained")
ARMS_OF_STAGE = {"trained": ("memory_off", "trained"), "base": ("base",), "untrained": ("untrained",)}
METRICS = ("efficacy", "paraphrase", "later_efficacy", "later_paraphrase", "locality")
NO_BASE = "a plain checkpoint does not name its original: give base= with its folder or hub id"


@dataclass(frozen=True)
class Asked:
    """One prompt about one fact."""

    metric: str
    fact: Fact
    question: Question


class FactsSuite:
    """Asks the arms one after the other, and scores them when all have answered.

    missing: stages without a model -> reason. base_is_model: there is no base but the model itself.
    Raises `ValueError` when the tokenizer cannot spell the facts, `FileNotFoundError` or `ConfigError` for a
    report of `before` that is not there or not about these facts.
    """

    def __init__(
        self,
        name: str,
        suite: FactsSuiteConfig,
        config: EvalConfig,
        tokenizer,
        missing: dict[str, str],
        base_is_model: bool,
    ) -> None:
        self.name, self.suite = name, suite
        self.before = _read_before(name, suite)
        self.task = FactsTask(suite.facts, tokenizer)
        first, later = self.task.first[: suite.n], self.task.later[: suite.n]
        self.items = [
            Asked(metric, fact, question)
            for metric, facts, prompts in (
                ("efficacy", first, ("trained",)),
                ("paraphrase", first, ("held_out",)),
                ("later_efficacy", later, ("trained",)),
                ("later_paraphrase", later, ("held_out",)),
                ("locality", self.task.neighbours[: suite.n], ("trained", "held_out")),
            )
            for each in prompts
            for fact, questions in zip(facts, self.task.questions(facts, each))
            for question in questions
        ]
        self.reasons = {arm: missing[stage] for stage in missing for arm in ARMS_OF_STAGE[stage]}
        if base_is_model:
            self.reasons["base"] = NO_BASE
        if missing.get("untrained") == NO_MEMORY:
            self.reasons["memory_off"] = NO_MEMORY
        self.arms = [arm for arm in FACT_ARMS if arm in config.arms]
        self.said: dict[str, list[str]] = {}  # arm -> what it answered to each item

    def wanted(self, stage: str) -> list[str]:
        """Arms to ask of the model of `stage`; the base is asked for locality even if it is no arm."""
        return [a for a in ARMS_OF_STAGE[stage] if (a in self.arms or a == "base") and a not in self.reasons]

    @property
    def n_answers(self) -> int:
        return sum(len(self._places(arm)) for stage in ARMS_OF_STAGE for arm in self.wanted(stage))

    def ask(self, stage: str, asker: Asker) -> None:
        """Ask the arms that the model of `stage` can answer for."""
        for arm in self.wanted(stage):
            if arm == "memory_off":
                with ml.disabled(asker.model):
                    self.said[arm] = self._answers(asker, self._places(arm))
            else:
                self.said[arm] = self._answers(asker, self._places(arm))

    def _places(self, arm: str) -> list[int]:
        """The items an arm is asked for: all, or of a base that is no arm those that locality compares with."""
        return [at for at, item in enumerate(self.items) if arm in self.arms or item.metric == "locality"]

    def _answers(self, asker: Asker, places: list[int]) -> list[str]:
        """Answers in the order of the items, asked in the order of their lengths; "" where nothing was asked."""
        order = sorted(places, key=lambda place: len(self.items[place].question.ids))
        samples = [Sample(self.task.bos, [self.items[at].question], [0.0], at, 0) for at in order]
        longest = max(len(item.question.answer_ids) for item in self.items)
        answers = [""] * len(self.items)
        for at, (text,) in zip(order, asker.in_one_call(samples, n_answer=longest)):
            answers[at] = said_object(text)
        return answers

    def rows(self) -> list[dict]:
        """One row a prompt and arm, for samples.jsonl."""
        return [
            {
                "suite": self.name,
                "regime": "P",
                "metric": item.metric,
                "arm": arm,
                "relation": item.fact.relation,
                "subject": item.fact.subject,
                "question": self.task.speller.decode(item.question.ids),
                "prediction": said,
                "answers": [self._target(place)],
                "correct": said == self._target(place),
            }
            for arm in self.arms
            if arm in self.said
            for place, (item, said) in enumerate(zip(self.items, self.said[arm]))
            if item.metric != "locality" or ("base" in self.said and arm != "base")
        ]

    def report(self) -> dict:
        """{chance, metrics[metric][arm], controls[control][arm], forgetting[metric]} of this suite.

        A cell is {n, facts, accuracy, ci_low, ci_high} or {not_run: reason}.
        """
        metrics = {
            metric: {
                arm: self._cell(metric, arm) for arm in self.arms if (metric, arm) != ("locality", "base")
            }
            for metric in METRICS
        }
        shuffled = {arm: self._shuffled(arm) for arm in self.arms}
        report = {"chance": self.task.chance, "metrics": metrics, "controls": {"shuffled_facts": shuffled}}
        if self.before is not None:
            report["forgetting"] = _forgetting(self.before, metrics)
        return report

    def _target(self, place: int) -> str:
        item = self.items[place]
        return self.said["base"][place] if item.metric == "locality" else item.fact.object

    def _cell(self, metric: str, arm: str) -> dict:
        if arm in self.reasons:
            return {"not_run": self.reasons[arm]}
        if metric == "locality" and "base" in self.reasons:
            return {"not_run": self.reasons["base"]}
        places = [place for place, item in enumerate(self.items) if item.metric == metric]
        return _share([(self.items[at].fact, self.said[arm][at] == self._target(at)) for at in places])

    def _shuffled(self, arm: str) -> dict:
        if arm in self.reasons:
            return {"not_run": self.reasons[arm]}
        asked = [
            (item.fact, said) for item, said in zip(self.items, self.said[arm]) if item.metric == "efficacy"
        ]
        facts = list(dict.fromkeys(fact for fact, _ in asked))
        swapped = _next_of_relation(facts)
        return _share([(fact, said == swapped[fact].object) for fact, said in asked if fact in swapped])


def _next_of_relation(facts: list[Fact]) -> dict[Fact, Fact]:
    """Each fact -> the next one of its relation, going round; facts that are alone in theirs have none."""
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact)
    return {
        fact: group[(place + 1) % len(group)]
        for group in by_relation.values()
        if len(group) > 1
        for place, fact in enumerate(group)
    }


def _share(answered: list[tuple[Fact, bool]]) -> dict:
    """Share right over prompts, with Wilson's interval for the number of different facts."""
    if not answered:
        return {"not_run": "there are no such facts"}
    facts, accuracy = len({fact for fact, _ in answered}), sum(right for _, right in answered) / len(answered)
    low, high = wilson(round(accuracy * facts), facts)
    return {"n": len(answered), "facts": facts, "accuracy": accuracy, "ci_low": low, "ci_high": high}


def _read_before(name: str, suite: FactsSuiteConfig) -> dict | None:
    """The metrics of the earlier report, checked to be about the same facts."""
    if suite.before is None:
        return None
    path, where = Path(suite.before), f"suites.{name}.before"
    if not path.is_file():
        raise FileNotFoundError(
            f"{where}: there is no file {suite.before!r}; give the report.json from before"
        )
    try:
        report = read_report(path)
        metrics, config = report["facts"][name]["metrics"], report["config"]["suites"][name]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{where}: {suite.before!r} is no report with a facts suite {name!r}") from None
    now = suite.model_dump()
    for field in ("facts", "n"):
        if config.get(field) != now[field]:
            raise ConfigError(
                f"{where}: {suite.before!r} asked for other facts ({field} was {config.get(field)}, is {now[field]})"
            )
    return metrics


def _forgetting(before: dict, now: dict) -> dict[str, dict]:
    """For the trained arm and the first batch: {before, now, forgotten}, the share of prompts lost since."""
    cells = {}
    for metric in ("efficacy", "paraphrase"):
        earlier, later = before[metric].get("trained", {}), now[metric].get("trained", {})
        if "accuracy" in earlier and "accuracy" in later:
            was, is_now = earlier["accuracy"], later["accuracy"]
            cells[metric] = {"before": was, "now": is_now, "forgotten": was - is_now}
    return cells
