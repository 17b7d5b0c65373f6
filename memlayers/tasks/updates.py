"""Fact updates (the task of MemoryPrompt, 2402.15268): a history of statements, some of which change an earlier fact.

    history   . out one by one. home of cat mill | . at noon. home of dog sea | . the fence. home of cat lake
    question  . slow tune. home of cat ->  lake.

A statement is (subject, relation, object) with one relation, in the words of a telegram; the object that was stated
last counts. Every statement is a block of `statement_length` tokens with filler before it, and its full stop opens the
next block, so that in segments of that length each segment ends with an object. The question has the form of a statement
and is, with its answer, the last block. Which object a subject has is drawn anew for every history, so training and
evaluation share words but neither random streams (`rng_for`) nor anything that could be learned of an item; a guess is
right once in `n_objects`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from memlayers.config import ConfigError, Strict
from memlayers.limits import Tokens
from memlayers.tasks.filler import NoiseFiller
from memlayers.tasks.haystack import Question, Sample
from memlayers.tasks.kinds import Split
from memlayers.tasks.spelling import Speller

STOP = "."
RELATION = "home of"
SUBJECTS = ("cat", "dog", "key", "lamp", "letter", "secret", "train", "wind")
OBJECTS = (
    *("door", "farm", "garden", "hall", "harbour", "hill", "lake"),
    *("mill", "north", "path", "river", "road", "roof", "sea", "wall"),
)


class UpdatesConfig(Strict):
    """Fields of the fact update task.

    n_subjects: each has one fact. n_objects: that a fact can have. updates: share of the statements that give an
    earlier fact another object; more, where all facts are stated already. repeats: share of those that say again what
    is so, which asks for it within the history: for a base that learns to recall. statement_length: tokens of a
    statement with its filler.
    """

    type: Literal["updates"] = "updates"
    n_subjects: int = Field(len(SUBJECTS), ge=1, le=len(SUBJECTS))
    n_objects: int = Field(len(OBJECTS), ge=2, le=len(OBJECTS))
    updates: float = Field(0.5, ge=0, lt=1)
    repeats: float = Field(0.0, ge=0, lt=1)
    statement_length: Tokens = 8

    @model_validator(mode="after")
    def _room_for_new_facts(self) -> UpdatesConfig:
        if self.updates + self.repeats > 1:
            raise ConfigError(
                f"repeats: {self.repeats} and updates {self.updates} are more than all statements"
            )
        return self


@dataclass(frozen=True)
class Statement:
    """`object` is what `subject` has from now on."""

    subject: str
    object: str


def prompt(subject: str) -> str:
    """A statement up to its object: the question for it."""
    return f" {RELATION} {subject}"


class UpdatesTask:
    """Generator of histories for one tokenizer.

    Attributes: `subjects`: of the facts. `objects`: what each can have. `chance`: share that a guess among
    them gets right.
    Raises `ValueError` at construction when the tokenizer cannot spell the statements, or not in `statement_length`
    tokens.
    """

    def __init__(self, config: UpdatesConfig, tokenizer, split: Split = "train") -> None:
        self.config, self.split, self.speller = config, split, Speller(tokenizer)
        self.subjects = SUBJECTS[: config.n_subjects]
        self.objects, self.chance = OBJECTS[: config.n_objects], 1 / config.n_objects
        self._prompts = dict(
            zip(self.subjects, self.speller.ids_many(prompt(each) for each in self.subjects))
        )
        self._objects = dict(zip(self.objects, self.speller.ids_many(f" {each}" for each in self.objects)))
        self._stop = self.speller.ids(STOP)
        for each in self.subjects:
            self.speller.check(prompt(each))
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
        settled = {statement.subject: at for at, statement in enumerate(history)}
        last = max(1, n_statements - 1)
        wanted = rng.choice(list(settled.values())) if depth is None else depth * last
        subject, at = min(settled.items(), key=lambda item: abs(item[1] - wanted))
        answer = history[at].object
        blocks = [
            self._block(
                rng, self.statement_ids(each) if needle or each.subject != subject else [], first=not number
            )
            for number, each in enumerate(history)
        ]
        answer_ids = [*self._objects[answer], *self._stop]
        question_ids = self._block(rng, self._prompts[subject], first=False, room=len(answer_ids))
        question = Question(question_ids, answer_ids, (answer,), "object")
        return Sample([token for block in blocks for token in block], [question], [at / last], group, length)

    def history(self, rng: random.Random, n_statements: int) -> list[Statement]:
        """Statements in their order: new facts, updates of earlier ones and repeats, mixed; the first is new."""
        n_updates, n_repeats = (
            round(share * n_statements) for share in (self.config.updates, self.config.repeats)
        )
        n_new = min(max(1, n_statements - n_updates - n_repeats), len(self.subjects))
        later = ["new"] * (n_new - 1) + ["repeat"] * min(n_repeats, n_statements - n_new)
        later += ["update"] * (n_statements - 1 - len(later))
        rng.shuffle(later)
        new, history, value = rng.sample(self.subjects, n_new), [], {}
        for kind in ["new", *later]:
            subject = new[len(value)] if kind == "new" else rng.choice(list(value))
            if kind != "repeat":
                value[subject] = rng.choice([each for each in self.objects if each != value.get(subject)])
            history.append(Statement(subject, value[subject]))
        return history

    def statement_ids(self, statement: Statement) -> list[int]:
        """Tokens of a statement without filler and full stop."""
        return [*self._prompts[statement.subject], *self._objects[statement.object]]

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
