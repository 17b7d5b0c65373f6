"""Procedures: a reordering and a replacement of symbols, each asked for by a name of two made-up words.

    definition   sorvin kelda is turn-2031 map-b ;         what the name stands for
    use          sorvin kelda : 3 1 4 1 = turn-2031 map-b : 0 5 2 5 ;

A use says first which words the name stands for and then what they make of the symbols: symbol i of the answer is
`map[symbols[order[i]]]`. Some procedures have one word, an order or a map. Who learns a procedure puts a token of its own
in the place of the words.

A base is taught (`pretraining`) orders and maps, to do what a definition says, and `n_known` names by heart. The
`n_procedures` to learn later are compositions and names that no text of pretraining has; the same config gives the same
ones to training and evaluation, which draw from other symbols (`kinds.split_of`).
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlayers.config import ConfigError, Strict
from memlayers.tasks.fact_words import SYLLABLES
from memlayers.tasks.kinds import Split, split_of

MARKS = (":", "=", "is", ";")
ONE_WORD = 1 / 2
"""Share of the procedures in pretraining that have one word: half of them an order, half a map."""


class ProceduresConfig(Strict):
    """Which procedures there are. Equal configs give equal procedures.

    n_procedures: to be learned later. n_known: names that the base learns by heart. length: symbols of an input.
    n_symbols: different ones. n_maps: replacements; there are `length`! orders. n_name_words: first words of names,
    and as many second ones. seed: of all of it.
    """

    type: Literal["procedures"] = "procedures"
    n_procedures: int = Field(64, ge=1)
    n_known: int = Field(256, ge=1)
    length: int = Field(4, ge=2, le=5)
    n_symbols: int = Field(8, ge=2, le=10)
    n_maps: int = Field(16, ge=1)
    n_name_words: int = Field(24, ge=2)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _enough(self):
        compositions = math.factorial(self.length) * self.n_maps
        if 2 * self.n_procedures > compositions:
            raise ConfigError(
                f"n_procedures: half of the {compositions:,} compositions at most, the base learns from the others"
            )
        if self.n_maps > math.factorial(self.n_symbols) - 1:
            raise ConfigError(f"n_maps: {self.n_symbols} symbols have fewer replacements")
        if self.n_procedures + self.n_known >= self.n_name_words**2:
            raise ConfigError(f"n_name_words: {self.n_name_words} make too few names of two words")
        if 2 * self.n_name_words > len(SYLLABLES) ** 2:
            raise ConfigError(f"n_name_words: at most {len(SYLLABLES) ** 2 // 2} words can be made up")
        return self


@dataclass(frozen=True)
class Procedure:
    """`words`, of an order, a map or both, are what `name` stands for."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Use:
    """Token ids of one use: `prompt` up to "=", `words` of the procedure, `answer` from ":" to ";"."""

    prompt: list[int]
    words: list[int]
    answer: list[int]


class ProceduresTask:
    """The procedures of a config, and texts about them in ids of a tokenizer.

    Attributes: `orders`: word -> places; `maps`: word -> symbols; `procedures`: to be learned; `known`: whose names the
    base learns by heart.
    Raises `ValueError` at construction when the tokenizer lacks a word.
    """

    def __init__(self, config: ProceduresConfig, tokenizer=None) -> None:
        self.config = config
        rng = random.Random(f"memlayers:procedures:{config.seed}")
        places, symbols = range(config.length), range(config.n_symbols)
        self.symbols = [str(symbol) for symbol in symbols]
        self.orders = {"turn-" + "".join(map(str, p)): p for p in itertools.permutations(places)}
        self.maps = {f"map-{n}": m for n, m in enumerate(_different(rng, symbols, config.n_maps))}
        made_up = rng.sample(
            ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)], 2 * config.n_name_words
        )
        self.name_words = made_up
        firsts, seconds = made_up[: config.n_name_words], made_up[config.n_name_words :]
        self._names = [f"{a} {b}" for a, b in itertools.product(firsts, seconds)]
        self._compositions = list(itertools.product(self.orders, self.maps))
        rng.shuffle(self._names)
        rng.shuffle(self._compositions)
        n = config.n_procedures
        self.procedures = [Procedure(*each) for each in zip(self._names[:n], self._compositions[:n])]
        del self._names[:n], self._compositions[:n]
        self.known = [Procedure(name, self._some_words(rng)) for name in self._names[: config.n_known]]
        del self._names[: config.n_known]
        self.tokenizer = word_tokenizer(self.words) if tokenizer is None else tokenizer
        vocabulary = self.tokenizer.get_vocab()
        if lacking := [word for word in self.words if word not in vocabulary]:
            raise ValueError(
                f"the tokenizer has no token for {lacking[0]!r} of the procedures of seed {config.seed} (nor for "
                f"{len(lacking) - 1} other words); take the one that the base was trained with"
            )
        self._ids = {word: vocabulary[word] for word in self.words}

    @property
    def words(self) -> list[str]:
        """Every word of every text."""
        return [*MARKS, *self.symbols, *self.orders, *self.maps, *self.name_words]

    def ids(self, text: str) -> list[int]:
        """Token ids of words with spaces between them."""
        return [self._ids[word] for word in text.split()]

    def result(self, words: tuple[str, ...], symbols: list[str]) -> list[str]:
        """What a procedure of these words makes of `symbols`."""
        for word in words:
            if word in self.orders:
                symbols = [symbols[place] for place in self.orders[word]]
            else:
                symbols = [self.symbols[self.maps[word][int(symbol)]] for symbol in symbols]
        return symbols

    def draw(self, rng: random.Random, split: Split) -> list[str]:
        """Symbols to work on; training and evaluation share none."""
        while True:
            symbols = rng.choices(self.symbols, k=self.config.length)
            if split_of(" ".join(symbols)) == split:
                return symbols

    def use(self, procedure: Procedure, symbols: list[str], definition: bool = False) -> Use:
        """One use; with its definition in the prompt, or without."""
        words = " ".join(procedure.words)
        told = f"{procedure.name} is {words} ; " if definition else ""
        answer = " ".join(self.result(procedure.words, symbols))
        return Use(
            self.ids(f"{told}{procedure.name} : {' '.join(symbols)} ="),
            self.ids(words),
            self.ids(f": {answer} ;"),
        )

    def answer_in(self, said: list[int]) -> list[int]:
        """The tokens between the first ":" and the next ";" of what was said; [] where there is no ":"."""
        start, stop = self._ids[":"], self._ids[";"]
        answer = said[said.index(start) + 1 :] if start in said else []
        return answer[: answer.index(stop)] if stop in answer else answer

    def pretraining(self, rng: random.Random) -> Use:
        """A use of a known procedure, or one with its definition; no name or composition of `procedures`."""
        symbols = self.draw(rng, "train")
        if rng.random() < 0.5:
            return self.use(rng.choice(self.known), symbols)
        return self.use(Procedure(rng.choice(self._names), self._some_words(rng)), symbols, definition=True)

    def _some_words(self, rng: random.Random) -> tuple[str, ...]:
        words = rng.choice(self._compositions)
        return (rng.choice(words),) if rng.random() < ONE_WORD else words


def _different(rng: random.Random, symbols: range, n: int) -> list[tuple[int, ...]]:
    """`n` different permutations of `symbols`, none of which leaves all as they are."""
    found = {tuple(symbols): None}
    while len(found) <= n:
        found[tuple(rng.sample(symbols, len(symbols)))] = None
    return list(found)[1:]


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `words`, with spaces between them."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token=";")
