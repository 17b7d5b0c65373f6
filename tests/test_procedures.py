"""Generated procedures: what they do, by brute force; what training must never have seen."""

from __future__ import annotations

import itertools
import random

import pytest

from memlayers.config import ConfigError, validate
from memlayers.tasks.kinds import split_of
from memlayers.tasks.procedures import Procedure, ProceduresConfig, ProceduresTask, word_tokenizer

SMALL = {
    "n_compositions": 8,
    "n_compounds": 5,
    "n_names": 10,
    "n_known": 6,
    "n_orders": 4,
    "n_maps": 4,
    "n_name_words": 5,
}


@pytest.fixture(scope="module")
def task():
    return ProceduresTask(ProceduresConfig())


def small(**fields) -> ProceduresTask:
    return ProceduresTask(validate(ProceduresConfig, {**SMALL, **fields}))


def test_answers_by_brute_force(task):
    """Of every order and map, by the letters of the order and a table of the map."""
    rng = random.Random(0)
    for order, table in itertools.product(task.orders, task.maps):
        symbols = task.draw(rng, "train")
        turned = [symbols["abcd".index(letter)] for letter in order.removeprefix("turn-")]
        told = dict(zip(task.symbols, map(str, task.maps[table])))
        replaced = [told[symbol] for symbol in turned]
        assert task.result((order,), symbols) == turned
        assert task.result((order, table), symbols) == replaced
        use = task.use(Procedure(task.known[0].name, (order, table)), symbols, definition=True)
        name = task.known[0].name
        text = f"{name} is {order} {table} ; {name} : {' '.join(symbols)} = {order} {table} : {' '.join(replaced)} ;"
        assert task.tokenizer.decode([*use.prompt, *use.words, *use.answer]) == text
        assert task.tokenizer(text).input_ids == [*use.prompt, *use.words, *use.answer]
        assert task.answer_in([*use.words, *use.answer, *use.words]) == use.answer[1:-1]


def test_orders_and_maps_are_different_and_do_something(task):
    assert len(set(task.orders.values())) == len(task.orders) == 12
    assert len(set(task.maps.values())) == len(task.maps) == 24
    for of in (task.orders, task.maps):
        for values in of.values():
            assert sorted(values) == list(range(len(values))) != list(values)


def test_pretraining_sees_nothing_of_what_is_to_be_learned(task):
    rng = random.Random(1)
    new = task.new(64, seed=5)
    names, compositions = {p.name for p in new}, {p.words for p in new}
    assert len(names) == len(compositions) == 64
    known = {p.name: p.words for p in task.known}
    kinds = {"known": 0, "one word": 0, "two words": 0}
    for _ in range(3000):
        use = task.pretraining(rng)
        text = task.tokenizer.decode([*use.prompt, *use.words, *use.answer]).split()
        name, words = " ".join(text[:2]), tuple(task.tokenizer.decode(use.words).split())
        assert name not in names and tuple("+".join(words).split("+")) not in compositions
        assert split_of(" ".join(text[text.index("=") - 4 : text.index("=")])) == "train"
        assert ("is" in text) == (name not in known)
        assert known.get(name, words) == words
        kinds["known" if name in known else "two words" if len(words) == 2 else "one word"] += 1
    assert min(kinds.values()) > 500
    simple = [task.pretraining(rng, simple=True) for _ in range(300)]
    assert {task.tokenizer.decode(use.words) for use in simple} <= {*task.orders, *task.maps}
    assert all(task._ids["is"] in use.prompt for use in simple)


def test_a_compound_does_what_its_two_words_do(task):
    rng = random.Random(3)
    assert len(task.compounds) == 216 and not set(task.compounds) & set(task.held_out)
    for words, compound in task.compounds.items():
        symbols = task.draw(rng, "train")
        assert task.result((compound,), symbols) == task.result(words, symbols)
        assert len(task.ids(compound)) == 1


def test_new_procedures_go_by_seed_and_the_first_stay(task):
    assert task.new(16, 0) == task.new(64, 0)[:16]
    assert not set(task.new(16, 0)) & set(task.new(16, 1))
    again = ProceduresTask(ProceduresConfig())
    assert (again.new(64, 3), again.known, again.maps) == (task.new(64, 3), task.known, task.maps)
    other = ProceduresTask(ProceduresConfig(seed=1))
    assert other.maps != task.maps and set(other.held_out) != set(task.held_out)


def test_training_and_evaluation_share_no_symbols(task):
    rng = random.Random(2)
    drawn = {split: {" ".join(task.draw(rng, split)) for _ in range(500)} for split in ("train", "eval")}
    assert len(drawn["eval"]) > 150 and not drawn["train"] & drawn["eval"]


def test_an_answer_that_never_ends_or_never_begins(task):
    start, stop, one = task.ids(": ; 1")
    assert task.answer_in([one, one]) == [] and task.answer_in([one, start, one, one]) == [one, one]
    assert task.answer_in([stop, start, one, stop, one]) == [one]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_compositions": 9}, "n_compositions: at most half of all 16"),
        ({"n_compounds": 9}, "n_compounds: 8 compositions are not held out"),
        ({"n_names": 20}, "n_name_words: 5 make too few names"),
        ({"n_orders": 24}, "n_orders: 4 symbols have fewer"),
        ({"n_symbols": 2}, "n_maps: 2 symbols have fewer"),
        ({"n_name_words": 400}, "n_name_words: at most"),
        ({"n_map": 3}, "n_map: unknown field, did you mean 'n_maps'"),
    ],
)
def test_bad_fields(fields, said):
    with pytest.raises(ConfigError, match=said):
        small(**fields)


def test_more_than_are_held_out():
    with pytest.raises(ValueError, match="9 procedures are asked for, 8 compositions and 10 names"):
        small().new(9, 0)


def test_a_tokenizer_of_other_procedures(task):
    with pytest.raises(ValueError, match="the tokenizer has no token for 'turn-"):
        ProceduresTask(ProceduresConfig(), word_tokenizer([":", "=", "is", ";", *task.symbols]))
