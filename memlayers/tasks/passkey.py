"""Passkey retrieval: one key hidden in filler, asked for at the end (landmark attention, LongLLaMA).

Needle and question are short by default, so that both and an answer fit in a window of 32 tokens.
"""

from __future__ import annotations

import random
import re
from typing import Literal

from pydantic import Field, model_validator

from memlayers.config import Strict
from memlayers.limits import MOST_TOKENS
from memlayers.tasks.filler import NoiseFiller, ProseFiller
from memlayers.tasks.haystack import Question, Sample, hide
from memlayers.tasks.kinds import PROBES, Kind, Split, draw
from memlayers.tasks.spelling import Speller


class PasskeyConfig(Strict):
    """Fields of the passkey task.

    key_type: number (of `digits` digits), word (adjective-noun) or uuid. filler: noise (short sentences in
    random order) or prose (running text of `prose_file`). needle: sentence with `{key}`. question: what comes
    before the key. avoid_tail: the key never reaches into the last so many tokens of the context.
    """

    type: Literal["passkey"] = "passkey"
    key_type: Kind = "number"
    digits: int = Field(5, ge=1, le=18)
    filler: Literal["noise", "prose"] = "noise"
    prose_file: str | None = None
    needle: str = " The pass key is {key}."
    question: str = " The pass key is"
    avoid_tail: int = Field(0, ge=0, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _check(self) -> PasskeyConfig:
        if "{key}" not in self.needle:
            raise ValueError(
                f"needle: {self.needle!r} has no place for the key; write {{key}} where it belongs"
            )
        check_prose(self.filler, self.prose_file)
        return self


class PasskeyTask:
    """Generator of passkey items for one tokenizer and one split.

    Raises `ValueError` at construction when the tokenizer cannot spell the needle.
    """

    def __init__(self, config: PasskeyConfig, tokenizer, split: Split = "train") -> None:
        self.config, self.split = config, split
        self.speller = Speller(tokenizer)
        for probe in PROBES[config.key_type]:
            self.speller.check(config.needle.format(key=probe))
            self.speller.check(" " + probe, exact=True)
        self.filler = make_filler(config, self.speller, split, {config.key_type})
        self._question = self.speller.ids(config.question)

    def sample(
        self,
        rng: random.Random,
        length: int,
        depth: float | None = None,
        needle: bool = True,
        avoid_tail: int | None = None,
    ) -> Sample:
        """One item of exactly `length` tokens, context, question and answer together.

        depth: 0 = key at the start of the context, 1 = at its end, None = random. needle: False leaves the
        key out and keeps the question (the no-needle control). avoid_tail: in place of the config's.
        Raises `ValueError` naming the smallest possible length when `length` is too short for this item.
        """
        config = self.config
        group = rng.getrandbits(53)
        key = draw(rng, config.key_type, config.digits, self.split, set())
        depth = rng.random() if depth is None else depth
        answer = self.speller.ids(" " + key + stop_of(config.needle, "{key}"))
        question = Question(self._question, answer, (key,), config.key_type)
        needles = [self.speller.ids(config.needle.format(key=key))] if needle else []
        n_context = length - len(question.ids) - len(answer)
        tail = config.avoid_tail if avoid_tail is None else avoid_tail
        context, got = hide_or_explain(rng, self, needles, [depth][: len(needles)], n_context, tail, length)
        return Sample(context, [question], got or [depth], group, length)


def stop_of(template: str, field: str) -> str:
    """The punctuation behind `field` in a needle: it ends an answer too, so that a model learns where to stop.

    Without it a model trained on answers alone goes on with more digits, and its first number is another one.
    """
    return re.match(r"[^\w\s{}]*", template.partition(field)[2]).group()


def check_prose(filler: str, prose_file: str | None) -> None:
    """Raises `ValueError` where `filler` and `prose_file` do not go together."""
    if filler == "prose" and prose_file is None:
        raise ValueError("prose_file: filler 'prose' needs the path of a text file here")
    if filler != "prose" and prose_file is not None:
        raise ValueError(
            f"prose_file: filler {filler!r} reads no file; set filler: prose or take prose_file out"
        )


def make_filler(config, speller: Speller, split: Split, kinds: set[str]) -> NoiseFiller | ProseFiller:
    """The filler a task config asks for. `kinds`: answers of these kinds never occur in it."""
    if config.filler == "prose":
        return ProseFiller(speller, config.prose_file, split, kinds)
    return NoiseFiller(speller)


def hide_or_explain(
    rng, task, needles, depths, n_context, avoid_tail, length
) -> tuple[list[int], list[float]]:
    """`hide`, with an error that names the smallest length in the words of the caller."""
    start = task.speller.bos
    needed = len(start) + sum(map(len, needles)) + (avoid_tail if needles else 0)
    if n_context < needed:
        raise ValueError(
            f"length {length} is too short for this {task.config.type} item: it needs at least "
            f"{length + needed - n_context} tokens ({sum(map(len, needles))} of needles, "
            f"{length - n_context} of question and answer, {avoid_tail} of avoid_tail)."
        )
    return hide(rng, task.filler, needles, depths, n_context, start, avoid_tail)
