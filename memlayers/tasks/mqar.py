"""Multi-query associative recall (MQAR; zoology, 2312.04927): pairs of tokens, then keys asked for again.

    context   k3 v8 k1 v5 k7 v2 ...                  each key followed by its value
    question  k7 v2 _ _ k3 v8 _ _ _ _ k1 v5 _ _      keys at gaps of a power law, each followed by its value again

Keys and values are ids of disjoint halves of the vocabulary, special tokens left out; the first ordinary id is the
blank `_`. Only the values of the question have labels. A model reads the question with the values in it (teacher
forcing) and is asked for the most likely token behind each key. In zoology's code the value is a label alone, and the
place behind the key is filler; here it stands in the text, as in the paper, so that a row is an ordinary row for
next-token prediction. No key is asked for twice, so it gives nothing away.

Training and evaluation draw from other random streams (`rng_for`), but not from other keys: which value belongs to a
key is drawn anew for every row, so nothing learned of a key answers another row, and a key that training never saw
would be an embedding that was never trained.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from typing import Literal

from pydantic import Field, model_validator

from memlayers.config import ConfigError, Strict
from memlayers.limits import Count, Part, Scale, Tokens
from memlayers.tasks.haystack import Question, Sample
from memlayers.tasks.kinds import Split
from memlayers.tasks.spelling import Speller

TOKENS_PER_PAIR = 16


class MqarConfig(Strict):
    """Fields of the associative recall task.

    n_pairs: keys of a row; None: one for every `tokens_per_pair` tokens of its length (default 16: 4 in 64, 16 in
    256), so that a curriculum of lengths is one of pairs. n_queries: keys asked for, each once; None, or more than
    there are: all. question_length: tokens of the question, with which all the rest of a length is pairs. vocab_size: keys and values have ids below it; None: the tokenizer's; the model needs as many
    embeddings. overwrite: share of the keys that are written again with another value, somewhere among the others; the
    last value counts. passes: times the pairs are read, one after the other. power_a: exponent of the gaps; 1 is
    uniform, near 0 most keys are asked for soon. random_filler: blanks become random tokens that are no keys of the
    row. bos: the context begins with the tokenizer's first token, where it has one.
    """

    type: Literal["mqar"] = "mqar"
    n_pairs: Count | None = None
    tokens_per_pair: Tokens | None = Field(None, ge=4)
    n_queries: Count | None = None
    question_length: Tokens | None = Field(None, ge=2)
    vocab_size: Tokens | None = Field(None, ge=8)
    overwrite: float = Field(0.0, ge=0, le=1)
    passes: Part = 1
    power_a: Scale = 0.01
    random_filler: bool = False
    bos: bool = True

    @model_validator(mode="after")
    def _one_number_of_pairs(self) -> MqarConfig:
        if self.n_pairs is not None and self.tokens_per_pair is not None:
            raise ConfigError("tokens_per_pair: give this or n_pairs, not both")
        if self.question_length is not None and self.tokens_per_pair is not None:
            raise ConfigError("tokens_per_pair: give this or question_length, not both")
        return self


class MqarTask:
    """Generator of associative recall for one tokenizer.

    Attributes: `keys`, `values`: the ids of each half. `blank`: the id between queries. `chance`: share that a
    guess among all values gets right.
    Raises `ValueError` at construction when the vocabulary has too few ordinary tokens.
    """

    def __init__(self, config: MqarConfig, tokenizer, split: Split = "train") -> None:
        self.config, self.split = config, split
        self.bos = Speller(tokenizer).bos if config.bos else []
        self.vocab_size = config.vocab_size or len(tokenizer)
        special = set(tokenizer.all_special_ids)
        self.blank, *ordinary = (token for token in range(self.vocab_size) if token not in special)
        half = len(ordinary) // 2
        if half < 2:
            raise ValueError(f"vocab_size: {self.vocab_size} ids leave {half} keys and as many values")
        self.keys, self.values = ordinary[:half], ordinary[half : 2 * half]
        self.chance = 1 / half

    def pairs_in(self, length: int) -> int:
        """Number of keys of a row of `length` tokens."""
        if self.config.n_pairs is not None:
            return self.config.n_pairs
        return max(1, bisect_right(range(length), length, key=self.length_for) - 1)

    def length_for(self, n_pairs: int) -> int:
        """The length that has `n_pairs` keys where the number of pairs follows from the length."""
        if self.config.question_length is None:
            return len(self.bos) + n_pairs * (self.config.tokens_per_pair or TOKENS_PER_PAIR)
        n_written = n_pairs + round(self.config.overwrite * n_pairs)
        return len(self.bos) + self.config.passes * 2 * n_written + self.config.question_length

    def check_embeddings(self, n_embeddings: int, where: str) -> None:
        """Raises `ConfigError` when ids of the task have no embedding; `where` is the path of its block."""
        if self.vocab_size > n_embeddings:
            raise ConfigError(
                f"{where}.vocab_size: ids below {self.vocab_size:,} are drawn, the model has embeddings for "
                f"{n_embeddings:,} tokens"
            )

    def sample(self, rng: random.Random, length: int, needle: bool = True) -> Sample:
        """One row of exactly `length` tokens, pairs and queries together, with one question that asks for all.

        needle: False writes other pairs in place of those that are asked for, so that neither key nor value of
        any of them stands in the context. Raises `ValueError` when pairs and queries do not fit in `length`, or
        the vocabulary has too few keys or values.
        """
        group = rng.getrandbits(53)
        pairs, asked = self._pairs(rng, self.pairs_in(length))
        n_question = length - len(self.bos) - self.config.passes * 2 * len(pairs)
        if n_question < 2 * len(asked):
            raise ValueError(
                f"length {length} is too short for {self.pairs_in(length)} pairs: it needs at least "
                f"{length - n_question + 2 * len(asked)} tokens ({length - n_question} of context, "
                f"{2 * len(asked)} of queries)"
            )
        question = self._question(rng, dict(pairs), asked, n_question)
        if not needle:
            pairs = self._other_pairs(rng, pairs, asked)
        context = [*self.bos, *[token for pair in pairs for token in pair] * self.config.passes]
        return Sample(context, [question], [0.0], group, length)

    def _pairs(self, rng: random.Random, n_pairs: int) -> tuple[list[tuple[int, int]], list[int]]:
        """All (key, value) in the order of the context, the last of a key counts; and the keys asked for."""
        n_again = round(self.config.overwrite * n_pairs)
        if n_pairs + n_again > len(self.values):
            raise ValueError(
                f"vocab_size: {n_pairs} pairs, {n_again} of them written again, need {n_pairs + n_again} different "
                f"values, and {self.vocab_size} ids have {len(self.values)}"
            )
        keys = rng.sample(self.keys, n_pairs)
        written = keys + rng.sample(keys, n_again)
        if n_again:
            rng.shuffle(written)
        values = rng.sample(self.values, len(written))
        return list(zip(written, values)), rng.sample(keys, min(self.config.n_queries or n_pairs, n_pairs))

    def _question(
        self, rng: random.Random, value_of: dict[int, int], asked: list[int], size: int
    ) -> Question:
        """The asked keys, each with its value, at power-law gaps in `size` tokens; a last odd token is blank."""
        ids = [self.blank] * size
        if self.config.random_filler:
            ids = [self._filler(rng, value_of) for _ in ids]
        slots = power_law_slots(rng, size // 2, len(asked), self.config.power_a)
        for slot, key in zip(slots, asked):
            ids[2 * slot : 2 * slot + 2] = key, value_of[key]
        return Question(ids, [], (), "token", tuple(sorted(2 * slot + 1 for slot in slots)))

    def _filler(self, rng: random.Random, taken: dict[int, int]) -> int:
        while (token := rng.choice((self.keys, self.values)[rng.getrandbits(1)])) in taken:
            pass
        return token

    def _other_pairs(
        self, rng: random.Random, pairs: list[tuple[int, int]], asked: list[int]
    ) -> list[tuple[int, int]]:
        """`pairs` with random ones in place of those with an asked key; their answers occur in none."""
        value_of, taken = dict(pairs), set(asked)
        answers = {value_of[key] for key in asked}
        keys = [key for key in self.keys if key not in taken]
        values = [value for value in self.values if value not in answers]
        if not keys or not values:
            raise ValueError("vocab_size: every key is asked for, so none is left that is not")
        return [pair if pair[0] not in taken else (rng.choice(keys), rng.choice(values)) for pair in pairs]


def power_law_slots(rng: random.Random, n_slots: int, n_drawn: int, power_a: float) -> list[int]:
    """`n_drawn` different slots, drawn one after the other with weight (slot + 1)^(power_a - 1).

    An exponential race: of clocks that ring at these rates, the first `n_drawn`.
    """
    rings = [rng.expovariate((slot + 1) ** (power_a - 1)) for slot in range(n_slots)]
    return heapq.nsmallest(n_drawn, range(n_slots), key=rings.__getitem__)
