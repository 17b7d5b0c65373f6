"""Procedures in a tokenizer: the ids of their rows, in text and back, saved and loaded; and where there is no room."""

import copy

import pytest
from matrix import says
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import memlayers as ml
from memlayers.task_tokens.tokenizer import add_to_tokenizer


@pytest.fixture
def own(tokenizer):
    """A tokenizer of 400 tokens that a test may change."""
    return copy.deepcopy(tokenizer)


def refused(tokenizer, parts, first_id=400, names=("sort",)):
    before = tokenizer.get_vocab()
    with pytest.raises(ValueError, match=says(*parts)):
        add_to_tokenizer(tokenizer, first_id, list(names))
    assert tokenizer.get_vocab() == before


def test_names_become_tokens_of_their_ids(own, tiny_llama, tmp_path):
    memory = ml.attach(tiny_llama, ml.TaskTokensConfig(names=["sort", "copy it"]))
    memory.add_to_tokenizer(own)
    memory.add("reverse")
    memory.add_to_tokenizer(own)  # again, with one more
    own.save_pretrained(tmp_path)
    for tokenizer in (own, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 403
        ids = tokenizer.encode("key<|copy it|> 12<|reverse|>", add_special_tokens=False)
        assert [i for i in ids if i >= 400] == [memory.id_of("copy it"), memory.id_of("reverse")]
        assert tokenizer.decode(ids) == "key<|copy it|> 12<|reverse|>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "key 12"
    # A procedure is no word for another one to start from.
    with pytest.raises(ValueError, match="has no token of the base"):
        memory.add("more", init_from="<|sort|>", tokenizer=own)


def test_rows_that_the_tokenizer_has_no_token_for_are_bridged(own, tmp_path):
    add_to_tokenizer(own, 405, ["sort", None, "copy"])
    own.save_pretrained(tmp_path)
    for tokenizer in (own, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.convert_tokens_to_ids(["<|sort|>", "<|copy|>"]) == [405, 407]
        assert [tokenizer.convert_ids_to_tokens(i) for i in (400, 406)] == [
            "<|reserved_400|>",
            "<|reserved_406|>",
        ]
        assert tokenizer.encode("a <|sort|>", add_special_tokens=False)[-1] == 405


def test_no_room(own):
    own.add_tokens(["<|mine|>"])
    refused(own, ["no room for '<|sort|>'", "its id 400 is '<|mine|>'", "base's own tokenizer"])


def test_a_token_of_that_name_exists(own):
    own.add_tokens(["<|sort|>"])
    refused(own, ["has a token '<|sort|>' already, with id 400 and not 401", "another name"], first_id=401)


def test_a_tokenizer_that_knows_a_removed_procedure(own, tiny_llama):
    memory = ml.attach(tiny_llama, ml.TaskTokensConfig(names=["sort", "copy"]))
    memory.add_to_tokenizer(own)
    memory.remove("sort")
    memory.add_to_tokenizer(own)  # a free place asks for nothing
    memory.add("reverse")
    refused(own, ["no room for '<|reverse|>'", "'<|sort|>'"], names=memory.config.names)


def test_ids_with_holes():
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 7}, unk_token="a"))
    holey = PreTrainedTokenizerFast(tokenizer_object=raw)
    refused(holey, ["3 tokens, but ids up to 7", "fill the holes"], first_id=8)
