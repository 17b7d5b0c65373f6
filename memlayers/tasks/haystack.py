"""One item: a context of an exact number of tokens with needles at given depths, and questions about it."""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Question:
    """A question about a context.

    ids: tokens of the question, without BOS. answer_ids: tokens that should follow, with the stop that ends
    them. answers: the strings looked for (one for a passkey, several for multi-value and multi-query
    needles). kind: number, word or uuid. answer_at: places in `ids` of answers that stand between other tokens, each a
    single one (kind token); then `answer_ids` and `answers` are empty.
    """

    ids: list[int]
    answer_ids: list[int]
    answers: tuple[str, ...]
    kind: str
    answer_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A context and its questions.

    context: token ids, BOS first where the tokenizer adds one. depths: for each question, where its needle
    stands (0 = start of the context, 1 = end): the depth asked for, else the one it got. group: id of the
    haystack, shared by its questions. length: tokens of context + question + answer, for the longest
    question.
    """

    context: list[int]
    questions: list[Question]
    depths: list[float]
    group: int
    length: int


class Filler(Protocol):
    def draw(self, rng: random.Random, n_tokens: int) -> list[list[int]]: ...


def rng_for(split: str, seed: int, index: int) -> random.Random:
    """The random stream of item `index` of `split` ("train" or "eval"). The splits share no stream."""
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}.")
    return random.Random(f"memlayers:{split}:{seed}:{index}")


def hide(
    rng: random.Random,
    filler: Filler,
    needles: list[list[int]],
    depths: list[float],
    n_tokens: int,
    start: list[int],
    avoid_tail: int = 0,
) -> tuple[list[int], list[float]]:
    """Hides `needles` in a context of exactly `n_tokens` tokens; returns it with the depth each one got.

    needles: token ids, each placed at the sentence end nearest to its depth (0 … 1 of the filler). start: the
    ids the context starts with (BOS or nothing). avoid_tail: no needle reaches into the last `avoid_tail`
    tokens. The head of the filler is cut off to make the length exact. Needles that fall on the same sentence
    end stand in the order of their depths. Raises `ValueError` when the needles do not fit.
    """
    room = n_tokens - len(start) - sum(map(len, needles))
    if room < (avoid_tail if needles else 0):
        raise ValueError(f"short by {(avoid_tail if needles else 0) - room} tokens")
    sentences = _cut_head(filler.draw(rng, room), room) if room > 0 else []
    ends = [0]  # sentence ends, in tokens of filler; 0 stands for the start of the context
    for sentence in sentences:
        ends.append(ends[-1] + len(sentence))
    allowed = ends[: bisect.bisect_right(ends, room - avoid_tail)] if needles else ends
    placed = sorted((_nearest(allowed, depth * room), depth, index) for index, depth in enumerate(depths))
    context, got, at = list(start), [0.0] * len(needles), 0
    for position, end in enumerate(ends):
        if position:
            context += sentences[position - 1]
        while at < len(placed) and placed[at][0] == end:
            index = placed[at][2]
            got[index] = (len(context) - len(start)) / max(1, n_tokens - len(start) - len(needles[index]))
            context += needles[index]
            at += 1
    return context, got


def _cut_head(sentences: list[list[int]], n_tokens: int) -> list[list[int]]:
    """The last `n_tokens` tokens of `sentences`: whole ones, and before them the tail of one."""
    surplus, first = sum(map(len, sentences)) - n_tokens, 0
    while surplus >= len(sentences[first]):
        surplus -= len(sentences[first])
        first += 1
    return [sentences[first][surplus:], *sentences[first + 1 :]]


def _nearest(sorted_values: list[int], wanted: float) -> int:
    at = bisect.bisect_left(sorted_values, wanted)
    around = sorted_values[max(0, at - 1) : at + 1]
    return min(around, key=lambda value: abs(value - wanted))
