"""Closed-book facts: asked without any context, of every arm.

| measure | prompts | right when |
|---|---|---|
| efficacy | those trained, about the first batch | the object is named, exactly, greedy |
| paraphrase | held out of training, about the first batch | the same |
| later_efficacy, later_paraphrase | the same about the batch that is learned later | the same |
| locality | all, about subjects of no batch | the answer is the one the original base gives |
| shuffled_facts | those of efficacy | the answer is another fact's of the same relation: chance, and a liking |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiment import Bars, Experiment, Progress, Record, Table
from memlayers.eval.models import NO_MEMORY, ModelConfig, from_checkpoint, stages
from memlayers.eval.output import read_records
from memlayers.eval.probes import Prober
from memlayers.eval.statistics import Mean, Share
from memlayers.limits import Count
from memlayers.tasks import Fact, FactsConfig, FactsTask, Question, Sample
from memlayers.tasks.facts import said_object

FACT_ARMS = ("base", "memory_disabled", "untrained", "trained")
ARMS_OF = {"trained": ("memory_disabled", "trained"), "base": ("base",), "untrained": ("untrained",)}
NO_BASE = "a plain checkpoint does not name its original: give base= with its folder or hub id"
NO_FACTS = "there are no such facts"


class FactsEvalConfig(ModelConfig):
    """What is measured.

    Attributes:
        facts: the block that the facts were trained with.
        n: facts of a batch that are asked, the first so many; None: all.
        before: folder of an evaluation of the same facts from before something else was learned; what the first batch
            lost since then is its forgetting.
    """

    experiment: Literal["facts"] = "facts"
    facts: FactsConfig = FactsConfig()
    n: Count | None = None
    before: str | None = None


@dataclass(frozen=True)
class Probe:
    """One prompt about one fact."""

    measure: str
    fact: Fact
    question: Question


def measure(config: FactsEvalConfig, models, seed: int, progress: Progress) -> Iterator[Record]:
    """A record a prompt and arm; those of locality when the base has answered too."""
    before = _correct_before(config)
    tokenizer = models.tokenizer()
    task = FactsTask(config.facts, tokenizer)
    probes = make_probes(task, config.n)
    arms = [arm for arm in FACT_ARMS if arm in config.arms]
    reasons = {arm: models.missing[stage] for stage in models.missing for arm in ARMS_OF[stage]}
    if models.base_is_model:
        reasons["base"] = NO_BASE
    if models.missing.get("untrained") == NO_MEMORY:
        reasons["memory_disabled"] = NO_MEMORY
    predictions = _ask(config, models, task, probes, arms, reasons, progress)
    for arm in arms:
        found = {
            "efficacy": NO_FACTS, "paraphrase": NO_FACTS, "later_efficacy": NO_FACTS, "later_paraphrase": NO_FACTS,
            "locality": NO_FACTS, "shuffled_facts": NO_FACTS,
        }  # fmt: skip
        for record in _records(arm, task, probes, predictions, reasons, before):
            found.pop(record["measure"], None)
            yield record
        for name, reason in found.items():
            if (name, arm) != ("locality", "base"):
                reason = reasons.get(arm) or (reasons.get("base") if name == "locality" else None) or reason
                yield {"arm": arm, "measure": name, "not_run": reason}


def make_probes(task: FactsTask, n: int | None) -> list[Probe]:
    """All prompts, by measure."""
    first, later = task.first[:n], task.later[:n]
    return [
        Probe(name, fact, question)
        for name, facts, prompts in (
            ("efficacy", first, ("trained",)),
            ("paraphrase", first, ("held_out",)),
            ("later_efficacy", later, ("trained",)),
            ("later_paraphrase", later, ("held_out",)),
            ("locality", task.neighbours[:n], ("trained", "held_out")),
        )
        for each in prompts
        for fact, questions in zip(facts, task.questions(facts, each))
        for question in questions
    ]


def _ask(config, models, task, probes, arms, reasons, progress) -> dict[str, list[str]]:
    """Arm -> what it answered to each prompt; the base is asked for locality even if it is no arm."""
    predictions: dict[str, list[str]] = {}
    wanted = [arm for arm in FACT_ARMS if arm in {*arms, "base"} and arm not in reasons]
    bar = progress(total=len(wanted) * len(probes), desc="prompts", unit="prompt")
    for stage, model in stages(models, {stage for stage in ARMS_OF if {*ARMS_OF[stage]} & {*wanted}}):
        prober = Prober(model, models.tokenizer(), config.batch_size, config.margin, bar.update)
        for arm in (arm for arm in ARMS_OF[stage] if arm in wanted):
            places = [at for at, probe in enumerate(probes) if arm in arms or probe.measure == "locality"]
            if arm == "memory_disabled":
                with ml.disabled(model):
                    predictions[arm] = _answers(prober, task, probes, places)
            else:
                predictions[arm] = _answers(prober, task, probes, places)
        del prober, model
    bar.close()
    return predictions


def _answers(prober: Prober, task: FactsTask, probes: Sequence[Probe], places: list[int]) -> list[str]:
    """Answers in the order of the prompts, asked in the order of their lengths; "" where nothing was asked."""
    order = sorted(places, key=lambda place: len(probes[place].question.ids))
    samples = [Sample(task.bos, [probes[at].question], [0.0], at, 0) for at in order]
    longest = max(len(probe.question.answer_ids) for probe in probes)
    answers = [""] * len(probes)
    for at, (text,) in zip(order, prober.in_one_call(samples, n_answer=longest)):
        answers[at] = said_object(text)
    return answers


def _records(arm: str, task, probes, predictions, reasons, before) -> Iterator[Record]:
    if arm not in predictions or arm in reasons:
        return
    another = _next_of_relation(list(dict.fromkeys(p.fact for p in probes if p.measure == "efficacy")))
    for place, (probe, text) in enumerate(zip(probes, predictions[arm])):
        local = probe.measure == "locality"
        if local and ("base" not in predictions or arm == "base"):
            continue
        answer, fact = predictions["base"][place] if local else probe.fact.object, probe.fact
        record = {
            "arm": arm,
            "measure": probe.measure,
            "condition": "closed_book",
            "unit": f"{fact.relation}: {fact.subject}",
            "item": place,
            "question": task.speller.decode(probe.question.ids),
            "prediction": text,
            "answers": [answer],
            "correct": text == answer,
            "stale": fact in another and text == another[fact].object,
            "chance": 1.0 if local else task.chance,
        }
        if (arm, record["question"]) in before:
            record["forgotten"] = int(before[arm, record["question"]]) - int(record["correct"])
        yield record
        if probe.measure == "efficacy" and fact in another:
            swapped = {
                "measure": "shuffled_facts",
                "answers": [another[fact].object],
                "correct": record["stale"],
            }
            yield {k: v for k, v in record.items() if k not in ("stale", "forgotten")} | swapped


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


def _correct_before(config: FactsEvalConfig) -> dict[tuple[str, str], bool]:
    """(arm, question) of the first batch -> whether it was right in the evaluation of `before`.

    Raises `FileNotFoundError` where there is none, `ConfigError` where it asked for other facts.
    """
    if config.before is None:
        return {}
    head, records = read_records(config.before)
    if head["experiment"] != "facts":
        raise ConfigError(f"before: {config.before} is an evaluation of {head['experiment']}, not of facts")
    now = config.model_dump(mode="json")
    for name in ("facts", "n"):
        if head["config"][name] != now[name]:
            raise ConfigError(
                f"before: {config.before} asked for other facts ({name} was {head['config'][name]}, is {now[name]})"
            )
    first = ("efficacy", "paraphrase")
    return {
        (r["arm"], r["question"]): r["correct"] for r in records if r["measure"] in first and "correct" in r
    }


EXPERIMENT = Experiment(
    title="Facts asked without any context",
    about="Closed book: greedy answers up to the first full stop, exact. Efficacy: prompts that were trained; paraphrase: "
    "prompts that never were; later: the batch that is learned later; locality: prompts about subjects of no batch, "
    "answered as the original base does; shuffled facts: the answers to the efficacy prompts against another fact's object.",
    config=FactsEvalConfig,
    run=from_checkpoint(measure),
    measure=measure,
    keys=("arm", "measure"),
    unit="fact",
    metrics=(
        Share("correct", "accuracy"),
        Mean("forgotten", "forgotten"),
        Share("stale", "stale"),
        Mean("chance", "chance"),
    ),
    controls=("base", "memory_disabled", "untrained"),
    views=(
        Table(
            title="Share right",
            rows=("measure",),
            cols="arm",
            metrics=("accuracy",),
            where={"arm": FACT_ARMS},
        ),
        Table(
            title="Forgetting of the first batch",
            text="Share that was right before and is wrong now, less the share that came up.",
            rows=("arm", "measure"),
            metrics=("forgotten",),
            where={"arm": ("trained",)},
        ),
        Table(
            title="Guessing",
            text="Share that a guess among the objects of a relation gets right, and that is answered with another fact's object.",
            rows=("arm",),
            metrics=("chance", "stale"),
            where={"measure": ("efficacy",)},
        ),
        Bars(
            title="Facts asked without any context",
            file="facts",
            x="measure",
            hue="arm",
            metrics=("accuracy",),
        ),
    ),
)
