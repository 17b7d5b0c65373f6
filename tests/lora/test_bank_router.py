"""Vectors of texts and scores of shards."""

import pytest
import torch
import torch.nn.functional as F
from matrix import says

import memlayers as ml
from memlayers.lora.router import Router, best, scores_of
from tests.lora.bank_cases import CONFIG, QUESTIONS, TEXTS, some

TEXT = TEXTS["handbook"]


def router(makes, **fields):
    return Router(makes.model, makes.tokenizer, CONFIG.model_copy(update=fields))


def test_vectors_of_the_models_input(everywhere):
    ids = everywhere.tokenizer(TEXT, add_special_tokens=False).input_ids
    table = everywhere.model.get_input_embeddings().weight.detach().float()
    vectors = router(everywhere).document(TEXT)
    assert vectors.shape == (-(-len(ids) // 8), table.shape[1]) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors[1], F.normalize(table[ids[8:16]].mean(0), dim=0))
    torch.testing.assert_close(router(everywhere).question(TEXT), F.normalize(table[ids].mean(0), dim=0))


def test_vectors_of_the_models_output(everywhere):
    model, tokenizer = everywhere.model, everywhere.tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    vectors = router(everywhere, router="output").document(TEXT)
    with torch.no_grad():
        for parameter in ml.memories(model)["notes"].parameters():
            parameter.normal_()
    model.train()
    assert torch.equal(router(everywhere, router="output").document(TEXT), vectors), (
        "memory and dropout are off"
    )
    base = ml.detach(model).eval()
    start = [tokenizer.bos_token_id]
    with torch.no_grad():
        hidden = base.get_decoder()(torch.tensor([start + ids[8:16]])).last_hidden_state[0, 1:]
    torch.testing.assert_close(vectors[1], F.normalize(hidden.mean(0), dim=0))


def test_a_bank_that_is_routed_by_the_models_output(makes):
    bank = makes.new(config=CONFIG.model_copy(update={"steps": 0, "router": "output", "router_length": 90}))
    for name in TEXTS:
        bank.add(some(name), "red", name)
    for name, text in TEXTS.items():
        assert bank.route([text], groups=[["red"]], top_k=1) == [[(name, 1.0)]]


def test_the_default_router_finds_what_names_the_same_things(everywhere):
    bank = everywhere.new(config=CONFIG.model_copy(update={"steps": 0}))
    for name in TEXTS:
        bank.add(some(name), "red", name)
    routes = bank.route([*QUESTIONS, "When does the queen come to town?"], groups=[["red"]] * 3, top_k=1)
    assert routes == [[("handbook", 1.0)], [("menu", 1.0)], [("visit", 1.0)]]


def test_scores():
    question, shards = (
        F.normalize(torch.randn(5), dim=0),
        [F.normalize(torch.randn(n, 5), dim=1) for n in (1, 3, 2)],
    )
    scores = scores_of(question, shards)
    for score, shard in zip(scores, shards):
        assert score == pytest.approx(max(float(v @ question) for v in shard))
        assert scores_of(question, [shard]) == [score], "other shards change nothing"
    with pytest.raises(ValueError, match=says("5 wide", "those of the bank 4")):
        scores_of(question, [torch.ones(1, 4)])


def test_the_best_shards_and_their_weights():
    assert best(["a", "b", "c"], [0.1, 0.3, 0.3], 2, 0.1) == [("b", 0.5), ("c", 0.5)]
    (first, one), (second, two) = best(["a", "b"], [0.5, 0.4], 3, 0.1)
    assert (
        (first, second) == ("a", "b")
        and one / two == pytest.approx(2.718282)
        and one + two == pytest.approx(1)
    )
    assert best([], [], 2, 0.1) == []
