"""Fictional facts, asked without any context: what a model knows in its parameters alone (regime P).

    task = FactsTask(FactsConfig(n_facts=2000, seed=0), tokenizer)
    task.first[0]                                    # Fact(subject='Barimon', relation='home', object='mill')
    task.questions(task.first, "trained")[0][0]      # " Barimon lives in the" -> " mill."

Here training and evaluation share the facts, on purpose: closed-book evaluation asks for the very facts that were
trained, and the same config gives the same facts on both sides (`seed` is the facts' own, not the run's). What
evaluation keeps for itself are the held-out prompts, and the neighbours: subjects that no training ever names.

An answer ends with a full stop, as a passkey does, so that a model learns where to stop. Objects are drawn
uniformly from the 40 of their relation, so guessing is right once in 40 times.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from memlayers.config import Strict
from memlayers.limits import Count, Seed
from memlayers.tasks.fact_words import INITIALS, REAL_WORDS, RELATIONS, SYLLABLES
from memlayers.tasks.haystack import Question
from memlayers.tasks.spelling import Speller

Prompts = Literal["trained", "held_out"]
Batch = Literal["first", "later", "neighbours", "spare"]

BATCHES: tuple[str, ...] = ("first", "later", "neighbours", "spare")
STOP = "."
N_TRAINED = min(len(relation.trained) for relation in RELATIONS.values())
N_NAMES = len(INITIALS) * len(SYLLABLES) ** 3 - len(REAL_WORDS)


class FactsConfig(Strict):
    """Which facts there are. Equal configs give equal facts, in training and in evaluation.

    n_facts: facts of the first batch. n_later: facts of a second batch about other subjects, to be learned
    later. n_neighbours: facts that are never taught, about subjects of no batch, for locality; as many more
    are spare, for training that wants such prompts of its own. facts_per_subject: with more than one, a
    subject's facts have different relations, and the prompt must say which is asked for. n_paraphrases:
    prompts of a fact in training. seed: of names, relations and objects.
    """

    type: Literal["facts"] = "facts"
    n_facts: Count = 2000
    n_later: int = Field(500, ge=0, le=1_000_000)
    n_neighbours: int = Field(500, ge=0, le=1_000_000)
    facts_per_subject: int = Field(1, ge=1, le=len(RELATIONS))
    n_paraphrases: int = Field(N_TRAINED, ge=1, le=N_TRAINED)
    seed: Seed = 0

    @model_validator(mode="after")
    def _enough_names(self) -> FactsConfig:
        wanted = sum(-(-size // self.facts_per_subject) for size in self.sizes.values())
        if wanted > N_NAMES // 2:
            raise ValueError(
                f"n_facts: all batches together need {wanted:,} subjects, at most {N_NAMES // 2:,} have a name"
            )
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Facts of each batch."""
        return dict(zip(BATCHES, (self.n_facts, self.n_later, self.n_neighbours, self.n_neighbours)))


@dataclass(frozen=True)
class Fact:
    """`subject` has `object` as its `relation` (a key of `fact_words.RELATIONS`)."""

    subject: str
    relation: str
    object: str


class FactsTask:
    """The facts of a config, and questions about them for one tokenizer.

    Attributes: `first`, `later`: the facts to learn. `neighbours`, `spare`: facts that are never taught.
    `bos`: ids a question starts with. `chance`: share that a guess among a relation's objects gets right.
    Raises `ValueError` at construction when the tokenizer cannot spell names, prompts or objects.
    """

    def __init__(self, config: FactsConfig, tokenizer) -> None:
        self.config = config
        self.speller = Speller(tokenizer)
        self.bos = self.speller.bos
        self.chance = sum(1 / len(relation.objects) for relation in RELATIONS.values()) / len(RELATIONS)
        self._check_spelling()
        taken: set[str] = set()
        for batch, size in config.sizes.items():
            setattr(self, batch, _draw_facts(config, batch, size, taken))

    first: list[Fact]
    later: list[Fact]
    neighbours: list[Fact]
    spare: list[Fact]

    def questions(self, facts: Sequence[Fact], prompts: Prompts) -> list[list[Question]]:
        """For each fact one question a prompt: the `n_paraphrases` trained ones, or those held out."""
        asked = [[t.format(subject=f.subject) for t in self.templates(f.relation, prompts)] for f in facts]
        ids = iter(self.speller.ids_many(" " + text for texts in asked for text in texts))
        answers = self.speller.ids_many(f" {fact.object}{STOP}" for fact in facts)
        return [
            [Question(next(ids), answer, (fact.object,), "fact") for _ in texts]
            for fact, texts, answer in zip(facts, asked, answers)
        ]

    def templates(self, relation: str, prompts: Prompts) -> tuple[str, ...]:
        """Prompts of a relation, with `{subject}`."""
        if prompts == "trained":
            return RELATIONS[relation].trained[: self.config.n_paraphrases]
        return RELATIONS[relation].held_out

    def _check_spelling(self) -> None:
        names = [f"{a}{b}{c}{b}" for a, b, c in zip(INITIALS, SYLLABLES, SYLLABLES[::-1])]
        for relation in RELATIONS.values():
            for template, name in zip((*relation.trained, *relation.held_out), names):
                self.speller.check(" " + template.format(subject=name))
            for text in relation.objects:
                self.speller.check(f" {text}{STOP}", exact=True)
        for name in names:
            self.speller.check(" " + name, exact=True)


def said_object(text: str) -> str:
    """What a model named: its text up to the first full stop, without the space around it."""
    return text.partition(STOP)[0].strip()


def _draw_facts(config: FactsConfig, batch: str, size: int, taken: set[str]) -> list[Fact]:
    """`size` facts about subjects that are not in `taken`, which gains them."""
    rng = random.Random(f"memlayers:facts:{config.seed}:{batch}")
    facts: list[Fact] = []
    while len(facts) < size:
        subject = _name(rng, taken)
        relations = rng.sample(sorted(RELATIONS), config.facts_per_subject)
        facts += [Fact(subject, name, rng.choice(RELATIONS[name].objects)) for name in relations]
    return facts[:size]


def _name(rng: random.Random, taken: set[str]) -> str:
    while True:
        name = rng.choice(INITIALS) + "".join(rng.choices(SYLLABLES, k=3))
        if name not in taken and name not in REAL_WORDS:
            taken.add(name)
            return name
