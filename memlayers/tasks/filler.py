"""Filler: the sentences a needle is hidden in, tokenized once and drawn from many times."""

from __future__ import annotations

import random
import re
from pathlib import Path

from memlayers.config import ConfigError
from memlayers.files import DamagedFile, read_text
from memlayers.tasks.kinds import SPANS, Split
from memlayers.tasks.spelling import Speller
from memlayers.tasks.words import NOISE_SENTENCES

TRAIN_SHARE = 0.8


class NoiseFiller:
    """Short sentences of everyday things in random order, with nothing to learn from them."""

    def __init__(self, speller: Speller) -> None:
        self.sentences = speller.ids_many(" " + sentence for sentence in NOISE_SENTENCES)
        self._shortest = min(len(ids) for ids in self.sentences)

    def draw(self, rng: random.Random, n_tokens: int) -> list[list[int]]:
        """Sentences (lists of ids) of at least `n_tokens` tokens in all."""
        picked, total = [], 0
        for ids in rng.choices(self.sentences, k=n_tokens // self._shortest + 1):
            if total >= n_tokens:
                break
            picked.append(ids)
            total += len(ids)
        return picked


class ProseFiller:
    """Sentences of a text file in their order, from a random start, going round at the end.

    Training reads the first 80 % of the sentences and evaluation the last 20 %. Sentences in which an answer
    of one of `kinds` could stand (for numbers: any digit) and sentences the tokenizer has no tokens for are
    left out. Raises `FileNotFoundError` for a missing file, and `ValueError` for one without usable
    sentences or that is no UTF-8.
    """

    def __init__(self, speller: Speller, path: str | Path, split: Split, kinds: set[str]) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"prose_file: there is no file {str(path)!r}. Give the path of a plain text file."
            )
        try:
            sentences = split_sentences(read_text(path))
        except DamagedFile as error:
            raise ConfigError(f"prose_file: {error}") from None
        cut = round(len(sentences) * TRAIN_SHARE)
        part = sentences[:cut] if split == "train" else sentences[cut:]
        part = [s for s in part if not any(SPANS[kind].search(s) for kind in kinds)]
        encoded = speller.ids_many(" " + sentence for sentence in part)
        self.sentences = [ids for ids in encoded if ids and speller.knows(ids)]
        if not self.sentences:
            raise ValueError(
                f"prose_file: {str(path)!r} has no sentence to use for {split!r} ({len(sentences)} in all, "
                f"{len(part)} in this part without digits or keys). Give a longer text, or use filler: noise."
            )

    def draw(self, rng: random.Random, n_tokens: int) -> list[list[int]]:
        """Sentences (lists of ids) of at least `n_tokens` tokens in all."""
        at, picked, total = rng.randrange(len(self.sentences)), [], 0
        while total < n_tokens:
            picked.append(self.sentences[at])
            total += len(self.sentences[at])
            at = (at + 1) % len(self.sentences)
        return picked


def split_sentences(text: str) -> list[str]:
    """Splits prose into sentences. Blank lines and . ! ? (with a closing quote) end one."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        sentences += [s for s in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'’”)])\s+", flat) if s]
    return sentences
