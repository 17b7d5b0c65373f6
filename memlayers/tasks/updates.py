"""Fact updates (the task of MemoryPrompt, 2402.15268): a history of statements, some of which change an earlier fact.

    history   . Stars come out. The cat is at the mill | . Bread cools. The dog goes by the sea | . The cat is at the lake
    question  . Someone plays. The cat is at the ->  lake.

A fact belongs to a subject and a relation; the object that was stated last counts. Every statement is a block of
`statement_length` tokens with filler before it, and its full stop opens the next block, so that in segments of that
length each segment ends with an object. The question has the form of a statement and is, with its answer, the last
block. Which object belongs to a fact is drawn anew for every history, so training and evaluation share words but
neither random streams (`rng_for`) nor anything that could be learned of an item; a guess is right once in `n_objects`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from memlayers.config import Strict
from memlayers.tasks.filler import NoiseFiller
from memlayers.tasks.haystack import Question, Sample
from memlayers.tasks.kinds import Split
from memlayers.tasks.spelling import Speller

STOP = "."
RELATIONS = ("is at", "goes by")
SUBJECTS = ("cat", "dog", "key", "lamp", "letter", "secret", "train", "wind")
OBJECTS = (
    *("door", "farm", "garden", "hall", "harbour", "hill", "home", "lake"),
    *("mill", "north", "path", "river", "road", "roof", "sea", "wall"),
)

Fact = tuple[str, str]  # subject, relation


class UpdatesConfig(Strict):
    """Fields of the fact update task.

    n_subjects, n_relations: their product is the number of facts there are. n_objects: that a fact can have. updates:
    share of the statements that give an earlier fact another object; more, where all facts are stated already.
    statement_length: tokens of a statement with its filler.
    """

    type: Literal["updates"] = "updates"
    n_subjects: int = Field(4, ge=1, le=len(SUBJECTS))
    n_relations: int = Field(2, ge=1, le=len(RELATIONS))
    n_objects: int = Field(len(OBJECTS), ge=2, le=len(OBJECTS))
    updates: float = Field(0.5, ge=0, lt=1)
    statement_length: int = Field(12, ge=1)


@dataclass(frozen=True)
class Statement:
    """`object` is what `fact` has from now on."""

    fact: Fact
    object: str

    def text(self) -> str:
        return f"{prompt(self.fact)} {self.object}"


def prompt(fact: Fact) -> str:
    """A statement up to its object: the question for it."""
    return f" The {fact[0]} {fact[1]} the"


class UpdatesTask:
    """Generator of histories for one tokenizer.

    Attributes: `facts`: (subject, relation) of all. `objects`: what each can have. `chance`: share that a guess among
    them gets right.
    Raises `ValueError` at construction when the tokenizer cannot spell the statements, or not in `statement_length`
    tokens.
    """

    def __init__(self, config: UpdatesConfig, tokenizer, split: Split = "train") -> None:
        self.config, self.split, self.speller = config, split, Speller(tokenizer)
        self.facts = [(s, r) for s in SUBJECTS[: config.n_subjects] for r in RELATIONS[: config.n_relations]]
        self.objects, self.chance = OBJECTS[: config.n_objects], 1 / config.n_objects
        self._prompts = dict(zip(self.facts, self.speller.ids_many(prompt(fact) for fact in self.facts)))
        self._objects = dict(zip(self.objects, self.speller.ids_many(f" {each}" for each in self.objects)))
        self._stop = self.speller.ids(STOP)
        for fact in self.facts:
            self.speller.check(prompt(fact))
        for each in self.objects:
            self.speller.check(f" {each}", exact=True)
        longest = max(map(len, self._prompts.values())) + max(map(len, self._objects.values()))
        needed = longest + max(len(self._stop), len(self.speller.bos)) + len(self._stop)
        if config.statement_length < needed:
            raise ValueError(
                f"statement_length: {config.statement_length} tokens are too few, the longest question and answer have "
                f"{needed}"
            )
        self.filler = NoiseFiller(self.speller)
        self.filler.sentences = [ids for ids in self.filler.sentences if self._neutral(ids)]

    def length_for(self, n_statements: int) -> int:
        """Tokens of a history of so many statements, with its question and answer."""
        return (n_statements + 1) * self.config.statement_length

    def sample(
        self, rng: random.Random, length: int, depth: float | None = None, needle: bool = True
    ) -> Sample:
        """A history and one question about it, of exactly `length` tokens in all.

        depth: 0 = the fact that was settled first is asked for, 1 = the one of the last statement, None = any, each fact
        alike. needle: False leaves out all that is said of the fact in question; filler stands there.
        Raises `ValueError` when `length` is no multiple of `statement_length`, or has no room for a statement.
        """
        n_statements, rest = divmod(length, self.config.statement_length)
        n_statements -= 1
        if rest or n_statements < 1:
            raise ValueError(
                f"length {length} is no history: statements, and the question, have {self.config.statement_length} tokens "
                f"each, so at least {self.length_for(1)} in all and a multiple of that"
            )
        group = rng.getrandbits(53)
        history = self.history(rng, n_statements)
        settled = {statement.fact: at for at, statement in enumerate(history)}
        last = max(1, n_statements - 1)
        wanted = rng.choice(list(settled.values())) if depth is None else depth * last
        fact, at = min(settled.items(), key=lambda item: abs(item[1] - wanted))
        answer = history[at].object
        blocks = [
            self._block(
                rng, self.statement_ids(each) if needle or each.fact != fact else [], first=not number
            )
            for number, each in enumerate(history)
        ]
        answer_ids = [*self._objects[answer], *self._stop]
        question_ids = self._block(rng, self._prompts[fact], first=False, room=len(answer_ids))
        question = Question(question_ids, answer_ids, (answer,), "object")
        return Sample([token for block in blocks for token in block], [question], [at / last], group, length)

    def history(self, rng: random.Random, n_statements: int) -> list[Statement]:
        """Statements in their order: new facts and updates of earlier ones, mixed; the first is new."""
        n_updates = round(self.config.updates * n_statements)
        n_new = min(max(1, n_statements - n_updates), len(self.facts))
        new = rng.sample(self.facts, n_new)
        is_new = [True] * (n_new - 1) + [False] * (n_statements - n_new)
        rng.shuffle(is_new)
        history, value = [], {}
        for starts in [True, *is_new]:
            fact = new[len(value)] if starts else rng.choice(list(value))
            value[fact] = rng.choice([each for each in self.objects if each != value.get(fact)])
            history.append(Statement(fact, value[fact]))
        return history

    def statement_ids(self, statement: Statement) -> list[int]:
        """Tokens of a statement without filler and full stop."""
        return [*self._prompts[statement.fact], *self._objects[statement.object]]

    def question_of(self, statement: Statement) -> tuple[list[int], list[int]]:
        """Tokens before the object of a statement, without filler, and those of the object."""
        return self._prompts[statement.fact], self._objects[statement.object]

    def _block(self, rng: random.Random, ids: list[int], first: bool, room: int = 0) -> list[int]:
        """`ids` at the end of a block that is `room` tokens short, behind the stop of the block before and filler."""
        start = self.speller.bos if first else self._stop
        size = self.config.statement_length - len(start) - len(ids) - room
        filler = [token for sentence in self.filler.draw(rng, size) for token in sentence]
        return [*start, *filler[len(filler) - size :], *ids]

    def _neutral(self, ids: list[int]) -> bool:
        """Whether a sentence names no subject and no object."""
        words = set(self.speller.decode(ids).strip().rstrip(STOP).lower().split())
        return not words & {*SUBJECTS, *OBJECTS}
