"""Procedures: a reordering and a replacement of symbols, each asked for by a name of two made-up words.

    definition   aror oten is turn-cabd map-5 ;                  what the name stands for
    use          aror oten : 3 1 4 1 = turn-cabd map-5 : 0 5 2 5 ;

A use says first which words the name stands for and then what they make of the symbols: symbol i of the answer is
`map[symbols[order[i]]]`. Some procedures have one word: an order, a map, or a compound, which is both in one token. Who
learns a procedure puts a token of its own in the place of the words.

A base is taught (`pretraining`) orders and maps, to do what a definition says, and `n_known` names by heart. Procedures
to learn later (`ProceduresTask.new`) have compositions and names that no text of pretraining has. Training and evaluation
of them draw from other symbols (`kinds.split_of`).
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
from memlayers.limits import Count, Part, Seed
from memlayers.tasks.fact_words import SYLLABLES
from memlayers.tasks.kinds import Split, split_of

MARKS = (":", "=", "is", ";")
PLACES = "abcde"
KNOWN, ONE_WORD, COMPOUND = 0.25, 0.5, 0.6
"""Shares in pretraining of known procedures, among the others of those of one word, and of compounds among these."""


class ProceduresConfig(Strict):
    """Which procedures there are. Equal configs give equal words, orders and maps.

    n_compositions, n_names: kept for procedures that are to be learned later. n_compounds: of the other compositions, so
    many have a word that says both at once, so that one token that calls an order and a map is nothing new to the base.
    n_known: names that the base learns by heart; others have a new meaning in every definition. length: symbols of an
    input.
    n_symbols: different ones. n_orders, n_maps: reorderings and replacements; none leaves all as it is. n_name_words:
    first words of names, and as many second ones. seed: of all of it.
    """

    type: Literal["procedures"] = "procedures"
    n_compositions: Count = 72
    n_compounds: int = Field(216, ge=0, le=1_000_000)
    n_names: Count = 192
    n_known: Count = 256
    length: int = Field(4, ge=2, le=5)
    n_symbols: int = Field(6, ge=2, le=10)
    n_orders: Part = 12
    n_maps: Part = 24
    n_name_words: int = Field(24, ge=2, le=4096)
    seed: Seed = 0

    @model_validator(mode="after")
    def _enough(self):
        compositions = self.n_orders * self.n_maps
        if 2 * self.n_compositions > compositions:
            raise ConfigError(
                f"n_compositions: at most half of all {compositions:,}, the base learns from the others"
            )
        if self.n_compounds > compositions - self.n_compositions:
            raise ConfigError(
                f"n_compounds: {compositions - self.n_compositions} compositions are not held out"
            )
        if self.n_orders > math.factorial(self.length) - 1:
            raise ConfigError(f"n_orders: {self.length} symbols have fewer orders")
        if self.n_maps > math.factorial(self.n_symbols) - 1:
            raise ConfigError(f"n_maps: {self.n_symbols} symbols have fewer replacements")
        if self.n_names + self.n_known >= self.n_name_words**2:
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

    Attributes: `orders`: word -> places; `maps`: word -> symbols; `compounds`: (order, map) -> word; `held_out`: compositions of no pretraining; `known`:
    procedures whose names the base learns by heart.
    Raises `ValueError` at construction when the tokenizer lacks a word.
    """

    def __init__(self, config: ProceduresConfig, tokenizer=None) -> None:
        self.config = config
        rng = random.Random(f"memlayers:procedures:{config.seed}")
        places, symbols = range(config.length), range(config.n_symbols)
        self.symbols = [str(symbol) for symbol in symbols]
        orders = rng.sample(list(itertools.permutations(places))[1:], config.n_orders)
        self.orders = {"turn-" + "".join(PLACES[place] for place in order): order for order in orders}
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
        self.held_out = self._compositions[: config.n_compositions]
        del self._compositions[: config.n_compositions]
        self.compounds = {words: "+".join(words) for words in self._compositions[: config.n_compounds]}
        self._new_names = [self._names.pop() for _ in range(config.n_names)]
        self.known = [Procedure(self._names.pop(), self._some_words(rng)) for _ in range(config.n_known)]
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
        compounds = self.compounds.values()
        return [*MARKS, *self.symbols, *self.orders, *self.maps, *compounds, *self.name_words]

    def new(self, n: int, seed: int) -> list[Procedure]:
        """`n` procedures to learn: held-out compositions, held-out names, put together by `seed`. The first ones are the
        same whatever `n` is.

        Raises `ValueError` for more than there are.
        """
        if n > min(len(self.held_out), len(self._new_names)):
            raise ValueError(
                f"{n} procedures are asked for, {len(self.held_out)} compositions and {len(self._new_names)} names are "
                "held out"
            )
        rng = random.Random(f"memlayers:new_procedures:{seed}")
        names, words = (rng.sample(of, len(of)) for of in (self._new_names, self.held_out))
        return [Procedure(*each) for each in zip(names[:n], words)]

    def ids(self, text: str) -> list[int]:
        """Token ids of words with spaces between them."""
        return [self._ids[word] for word in text.split()]

    def result(self, words: tuple[str, ...], symbols: list[str]) -> list[str]:
        """What a procedure of these words makes of `symbols`."""
        for word in "+".join(words).split("+"):
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

    def pretraining(self, rng: random.Random, simple: bool = False) -> Use:
        """A use of a known procedure, or one with its definition; no held-out name or composition.

        simple: definitions only, each of one order or one map; a base that begins with them learns several times faster.
        """
        symbols = self.draw(rng, "train")
        if simple:
            words = (rng.choice([*self.orders, *self.maps]),)
        elif rng.random() < KNOWN:
            return self.use(rng.choice(self.known), symbols)
        else:
            words = self._some_words(rng)
        return self.use(Procedure(rng.choice(self._names), words), symbols, definition=True)

    def _some_words(self, rng: random.Random) -> tuple[str, ...]:
        words = rng.choice(self._compositions)
        if rng.random() >= ONE_WORD:
            return words
        if self.compounds and rng.random() < COMPOUND:
            return (rng.choice(list(self.compounds.values())),)
        return (rng.choice(words),)


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
