"""Texts to measure on: unseen prose, and random tokens that nobody can guess."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from memlayers.config import Strict
from memlayers.files import read_text
from memlayers.limits import Count
from memlayers.tasks.fact_words import RELATIONS
from memlayers.tasks.filler import TRAIN_SHARE, split_sentences


class ProseConfig(Strict):
    """Prose to measure on: the last part of a text file, which tasks with prose filler do not train on.

    Attributes:
        file: a plain text file.
        windows: tokens of a sequence, in windows.
        n_sequences: how many sequences, fewer if the text ends before.
    """

    file: str
    windows: Count = 8
    n_sequences: Count = Field(32, ge=2)


def unseen_prose(config: ProseConfig, tokenizer, window: int) -> torch.Tensor:
    """Sequences (n_sequences, windows · window) of the evaluation part of the file.

    Raises `FileNotFoundError` for a missing file, `ValueError` when the text is too short for two sequences.
    """
    ids = _tokens(config.file, tokenizer, unseen=True)
    length = config.windows * window
    n = min(config.n_sequences, len(ids) // length)
    if n < 2:
        raise ValueError(
            f"file: the last fifth of {config.file!r} has {len(ids)} tokens, two sequences of {length} are needed; "
            "lower windows or give a longer text"
        )
    return ids[: n * length].view(n, length)


def training_prose(file: str, tokenizer) -> torch.Tensor:
    """The tokens (n,) of the first part of the file. Raises `FileNotFoundError`."""
    return _tokens(file, tokenizer, unseen=False)


def _tokens(file: str, tokenizer, unseen: bool) -> torch.Tensor:
    if not Path(file).is_file():
        raise FileNotFoundError(f"file: there is no file {file!r}")
    sentences = split_sentences(read_text(file))
    at = round(len(sentences) * TRAIN_SHARE)
    text = " ".join(sentences[at:] if unseen else sentences[:at])
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]


def tokens_of_words(tokenizer) -> list[int]:
    """The tokens that spell the objects of the fictional facts: an alphabet that a checkpoint has learned."""
    words = [f" {word}" for relation in RELATIONS.values() for word in relation.objects]
    return sorted({token for word in words for token in tokenizer(word, add_special_tokens=False).input_ids})


def random_texts(alphabet: Sequence[int], length: int, generator: torch.Generator) -> torch.Tensor:
    """Two texts (2, 1, length + 1) of tokens drawn alike; the first token of each is not predicted."""
    return torch.tensor(alphabet)[torch.randint(len(alphabet), (2, 1, length + 1), generator=generator)]
