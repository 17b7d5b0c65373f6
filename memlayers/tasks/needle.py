"""Needles in a haystack as RULER defines them: several keys, several values a key, several keys a question.

| RULER | here |
|---|---|
| multikey_1 | `n_keys: 4` (one is asked for, the others distract) |
| multikey_2 | `filler: needles` (nothing but needles) |
| multikey_3 | `filler: needles`, `key_type: uuid`, `value_type: uuid` |
| multivalue | `n_values: 4` |
| multiquery | `n_keys: 4`, `n_queries: 4` |

`n_questions` asks several questions about one haystack, about different keys: it is written to memory once.
"""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field, model_validator

from memlayers.config import Strict
from memlayers.limits import MOST_TOKENS, Count
from memlayers.tasks.haystack import Question, Sample
from memlayers.tasks.kinds import PROBES, Kind, Split, draw
from memlayers.tasks.passkey import check_prose, hide_or_explain, make_filler, stop_of
from memlayers.tasks.spelling import Speller

NAMES = {"number": "number", "word": "word", "uuid": "code"}


class NeedleConfig(Strict):
    """Fields of the needle task.

    key_type, value_type: number (of `digits` digits), word (adjective-noun) or uuid. n_keys: keys in the
    haystack, each with `n_values` values, each value in a sentence of its own. n_queries: keys one question
    asks for. n_questions: questions about one haystack. filler: noise, prose (running text of `prose_file`)
    or needles. needle: sentence with `{name}`, `{key}` and `{value}`. question and question_many (more than
    one answer): with `{name}` and `{keys}`. avoid_tail: no needle that is asked for reaches into the last so
    many tokens of the context.
    """

    type: Literal["needle"] = "needle"
    key_type: Kind = "word"
    value_type: Kind = "number"
    digits: int = Field(7, ge=1, le=18)
    n_keys: Count = 1
    n_values: Count = 1
    n_queries: Count = 1
    n_questions: Count = 1
    filler: Literal["noise", "prose", "needles"] = "noise"
    prose_file: str | None = None
    needle: str = " The secret {name} of {key} is {value}."
    question: str = " The secret {name} of {keys} is"
    question_many: str = " The secret {name}s of {keys} are"
    avoid_tail: int = Field(0, ge=0, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _check(self) -> NeedleConfig:
        if "{key}" not in self.needle or "{value}" not in self.needle:
            raise ValueError(f"needle: {self.needle!r} needs {{key}} and {{value}}")
        for field in ("question", "question_many"):
            if "{keys}" not in getattr(self, field):
                raise ValueError(f"{field}: {getattr(self, field)!r} needs {{keys}}")
        if self.n_queries * self.n_questions > self.n_keys:
            raise ValueError(
                f"n_keys: {self.n_questions} questions about {self.n_queries} keys each need "
                f"{self.n_queries * self.n_questions} keys, there are {self.n_keys}"
            )
        check_prose(self.filler, self.prose_file)
        return self


class NeedleTask:
    """Generator of needle items for one tokenizer and one split.

    Raises `ValueError` at construction when the tokenizer cannot spell the needles.
    """

    def __init__(self, config: NeedleConfig, tokenizer, split: Split = "train") -> None:
        self.config, self.split = config, split
        self.speller = Speller(tokenizer)
        for key in PROBES[config.key_type]:
            value = PROBES[config.value_type][0]
            self.speller.check(self._needle_text(key, value))
        for value in PROBES[config.value_type]:
            self.speller.check(" " + value, exact=True)
        kinds = {config.key_type, config.value_type}
        self.filler = None if config.filler == "needles" else make_filler(config, self.speller, split, kinds)

    def sample(
        self,
        rng: random.Random,
        length: int,
        depth: float | None = None,
        needle: bool = True,
        avoid_tail: int | None = None,
    ) -> Sample:
        """One haystack of exactly `length` tokens, longest question and its answer included.

        depth: of the first needle the first question asks for (0 = start, 1 = end); all other needles stand
        at random depths. needle: False leaves out the needles that are asked for and keeps the others and the
        questions. avoid_tail: in place of the config's. Raises `ValueError` naming the smallest possible
        length.
        """
        config = self.config
        group = rng.getrandbits(53)
        taken: set[str] = set()
        keys = [draw(rng, config.key_type, config.digits, self.split, taken) for _ in range(config.n_keys)]
        values = [
            [draw(rng, config.value_type, config.digits, self.split, taken) for _ in range(config.n_values)]
            for _ in keys
        ]
        wanted = [[rng.random() for _ in range(config.n_values)] for _ in keys]
        if depth is not None:
            wanted[0][0] = depth
        asked = config.n_queries * config.n_questions
        hidden = [
            (self.speller.ids(self._needle_text(key, value)), at, number)
            for number, (key, row, ats) in enumerate(zip(keys, values, wanted))
            for value, at in zip(row, ats)
            if needle or number >= asked
        ]
        questions = [self._question(keys, values, wanted, n) for n in range(config.n_questions)]
        n_context = length - max(len(q.ids) + len(q.answer_ids) for q in questions)
        tail = config.avoid_tail if avoid_tail is None else avoid_tail
        maker = self if self.filler is not None else _Distracted(self, taken)
        context, got = hide_or_explain(
            rng, maker, [ids for ids, _, _ in hidden], [at for _, at, _ in hidden], n_context, tail, length
        )
        first: dict[int, float] = {}
        for (_, _, number), at in zip(hidden, got):
            first.setdefault(number, at)
        depths = [
            first.get(n * config.n_queries, wanted[n * config.n_queries][0]) for n in range(len(questions))
        ]
        return Sample(context, questions, depths, group, length)

    def _needle_text(self, key: str, value: str) -> str:
        return self.config.needle.format(name=NAMES[self.config.value_type], key=key, value=value)

    def _question(
        self, keys: list[str], values: list[list[str]], wanted: list[list[float]], n: int
    ) -> Question:
        config = self.config
        rows = range(n * config.n_queries, (n + 1) * config.n_queries)
        # Values of one key are named in the order in which they stand in the haystack.
        answers = [v for row in rows for _, v in sorted(zip(wanted[row], values[row], strict=True))]
        template = config.question if len(answers) == 1 else config.question_many
        asked = ", ".join(keys[row] for row in rows)
        text = template.format(name=NAMES[config.value_type], keys=asked)
        answer = self.speller.ids(" " + ", ".join(answers) + stop_of(config.needle, "{value}"))
        return Question(self.speller.ids(text), answer, tuple(answers), config.value_type)


class _Distracted:
    """Filler made of needles about other keys, each key once (RULER multikey_2 and multikey_3)."""

    def __init__(self, task: NeedleTask, taken: set[str]) -> None:
        self.config, self.speller, self.filler = task.config, task.speller, self
        self._task, self._taken = task, taken

    def draw(self, rng: random.Random, n_tokens: int) -> list[list[int]]:
        config, sentences, total = self.config, [], 0
        while total < n_tokens:
            key = draw(rng, config.key_type, config.digits, self._task.split, self._taken)
            value = draw(rng, config.value_type, config.digits, self._task.split, self._taken)
            sentences.append(self.speller.ids(self._task._needle_text(key, value)))
            total += len(sentences[-1])
        return sentences
