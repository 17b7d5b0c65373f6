"""Kinds of keys and values: how each is drawn, and how its first span is found in a text.

Keys are split between training and evaluation by a hash of their text: one key in five belongs to evaluation,
and training never draws it. So no evaluation item can have been seen in training, whatever the seeds.
"""

from __future__ import annotations

import random
import re
import uuid
import zlib
from typing import Literal

from memlayers.tasks.words import ADJECTIVES, NOUNS

Kind = Literal["number", "word", "uuid"]
Split = Literal["train", "eval"]

SPANS: dict[str, re.Pattern[str]] = {
    "number": re.compile(r"\d+"),
    "word": re.compile(r"[a-z]+-[a-z]+", re.IGNORECASE),
    "uuid": re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE),
    "object": re.compile(r"[a-z]+", re.IGNORECASE),
}

# Everything that may stand in an answer of the kind, to test a tokenizer once before the first sample is
# drawn.
PROBES: dict[str, tuple[str, ...]] = {
    "number": ("1234567", "8905", "40711"),
    "word": tuple(f"{a}-{n}" for a, n in zip((ADJECTIVES * 2)[: len(NOUNS)], NOUNS, strict=True)),
    "uuid": ("0f1e2d3c-4b5a-4697-8879-6a5b4c3d2e1f",),
}


def split_of(text: str) -> Split:
    """`"eval"` for one text in five, by CRC-32, else `"train"`."""
    return "eval" if zlib.crc32(text.encode()) % 5 == 0 else "train"


def draw(rng: random.Random, kind: Kind, digits: int, split: Split, taken: set[str]) -> str:
    """Draws one key or value of `kind` that belongs to `split` and is not in `taken`, and adds it to `taken`.

    Raises `ValueError` when 10,000 draws give nothing new: the space is too small for what was asked.
    """
    for _ in range(10_000):
        text = _draw_once(rng, kind, digits)
        if text not in taken and split_of(text) == split:
            taken.add(text)
            return text
    raise ValueError(
        f"no {kind} left to draw ({len(taken)} are taken, digits={digits}): ask for fewer keys and values, "
        "more digits or another kind."
    )


def _draw_once(rng: random.Random, kind: Kind, digits: int) -> str:
    if kind == "number":
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind == "word":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def first_spans(text: str, kind: str, count: int = 1) -> list[str]:
    """The first `count` different spans of `kind` in `text`, in lower case, in order of appearance."""
    found: list[str] = []
    for match in SPANS[kind].finditer(text):
        span = match.group().lower()
        if span not in found:
            found.append(span)
        if len(found) == count:
            break
    return found
