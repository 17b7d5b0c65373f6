"""Ids and groups that look alike are one; what messages tell."""

import unicodedata

import pytest
from matrix import says

from tests.lora.bank_cases import QUESTIONS, TEXTS, files, found_in, some, traces

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Café-Müller") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("first, second", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_an_id_in_two_forms_of_unicode_is_one(bank, first, second):
    manifest = bank.add({first: TEXTS["secret"]}, "red", "vault")
    assert list(manifest.documents) == [COMPOSED]
    with pytest.raises(ValueError, match="is in the bank already"):
        bank.add({second: "Another text of that name."}, "red")
    (manifest,) = bank.update({second: "The vault has a new word, Okapi."})
    assert manifest.updated == {COMPOSED: [2]}
    assert bank.forget(second) == []
    assert found_in(bank.path, traces("The vault has a new word, Okapi.", COMPOSED, DECOMPOSED)) == []
    assert found_in(bank.path, traces(TEXTS["secret"])) == []


def test_two_forms_in_one_call(unchanged):
    texts = {COMPOSED: "One text of some words.", DECOMPOSED: "Another text of some words."}
    for change in (lambda: unchanged.add(texts, "red"), lambda: unchanged.update(texts)):
        with pytest.raises(ValueError, match="two documents have the id 'Café-Müller'"):
            change()


def test_ids_that_do_not_look_alike_are_two(bank):
    bank.add({"x²": TEXTS["secret"], "x2": "Another text of some words."}, "red", "powers")
    (left,) = bank.forget("x²")
    assert list(left.documents) == ["x2"]


@pytest.mark.parametrize("first, second", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_group_in_two_forms_of_unicode_is_one(bank, first, second):
    assert bank.add(some("secret"), first, "vault").group == COMPOSED
    assert [m.name for m in bank.list([second])] == ["vault"]
    assert bank.route(QUESTIONS, groups=[[second], [first]]) == [[("vault", 1.0)]] * 2


@pytest.mark.parametrize(
    "char, told",
    [
        ("\n", "control"),
        ("\0", "control"),
        ("\x7f", "control"),
        ("\ud800", "surrogate"),
        ("\u2028", "line break"),
    ],
)
def test_characters_that_no_id_has(unchanged, char, told):
    with pytest.raises(ValueError, match=says("document id", "'a", told)):
        unchanged.add({f"a{char}b": TEXTS["secret"]}, "red")
    with pytest.raises(ValueError, match=says("the group", told)):
        unchanged.add(some("secret"), f"a{char}")
    with pytest.raises(KeyError, match="no document"):
        unchanged.forget(f"a{char}b")


def test_a_text_that_no_file_takes(unchanged):
    for change in (unchanged.add, lambda texts, group: unchanged.update(texts)):
        with pytest.raises(ValueError, match=says("'menu' has half of a surrogate pair at character 3")):
            change({"menu": "one\udc80 two three"}, "red")


@pytest.mark.parametrize(
    "document",
    ['quo"te', "back\\slash", "é", "{}", "a/../b", "%s", "😀", "name", "documents", "x" * 5000, " spaced "],
)
def test_odd_ids_are_found_and_forgotten(bank, document):
    before = files(bank.path)
    bank.add({document: TEXTS["secret"]}, "red", "vault")
    assert document in bank.list()[-1].documents
    bank.forget([document])
    assert files(bank.path) == before


def test_ids_that_are_no_texts(unchanged):
    for wrong in ([3], [None], [b"menu"]):
        with pytest.raises(TypeError, match="ids of documents are texts"):
            unchanged.forget(wrong)


# what messages tell


def test_a_message_names_nothing_that_was_not_asked_for(bank):
    """Names, groups and documents of the bank, but for those that the caller named."""
    bank.add(some("secret"), "green", "vault")
    there = {"rules", "calls", "vault", "red", "blue", "green", "handbook", "menu", "visit", "secret"}
    for ask, own in (
        (lambda: bank.forget("none"), set()),
        (lambda: bank.update({"none": "Some words of a text."}), set()),
        (lambda: bank.export("none", bank.path.parent / "out"), set()),
        (lambda: bank.add(some("menu"), "blue"), {"menu", "blue"}),
        (lambda: bank.add({"none": "Some words of a text."}, "blue", "rules"), {"rules", "blue"}),
        (lambda: bank.merge(["rules", "calls"]), {"rules", "calls"}),
        (lambda: bank.route(QUESTIONS, groups=[["red"]]), {"red"}),
    ):
        with pytest.raises((KeyError, ValueError)) as error:
            ask()
        told = str(error.value)
        assert [name for name in there - own if f"'{name}'" in told or f" {name}-" in told] == []
