"""Generation with caches that the caller made, and the ways to generate that take tokens back."""

import pytest
import torch
from cache_cases import CACHES, CROPS, stateful
from matrix import TEXT, llama, near, says, tokens
from transformers import DynamicCache

import memlayers as ml
from memlayers.core.cache import MemoryCache

NEW = 4


def follow():
    return tokens(2, 3, seed=9)


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences, torch.stack(output.logits, 1)


@torch.no_grad()
@stateful
def test_generate_with_a_cache_of_the_callers(name):
    model, ids = llama(name).model(), tokens(2, TEXT)
    expected, logits = generate(model, ids)
    for make in CACHES.values():
        cache = make(model)
        got, got_logits = generate(model, ids, past_key_values=cache)
        assert torch.equal(got, expected)
        near(got_logits, logits)
        assert isinstance(cache, MemoryCache) and cache.get_seq_length() == TEXT + NEW - 1
        state = cache.memory_state
        near(
            model(follow(), memory_state=state).logits,
            model(follow(), past_key_values=state.to_cache()).logits,
        )
    static, static_logits = generate(model, ids, cache_implementation="static")
    assert torch.equal(static, expected)
    near(static_logits, logits)


@torch.no_grad()
@stateful
def test_beams_with_a_cache_of_the_callers(name):
    model, ids = llama(name).model(), tokens(2, TEXT)
    options = {
        "num_beams": 2,
        "max_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **options), expected)


@torch.no_grad()
@stateful
def test_prompt_lookup_is_right_or_refused(name):
    model, ids = llama(name).model(), tokens(1, 6).repeat(1, 2)
    expected, _ = generate(model, ids, max_new_tokens=6)
    if name not in CROPS:
        with pytest.raises((NotImplementedError, ValueError), match=says("crop")):
            generate(model, ids, prompt_lookup_num_tokens=2, max_new_tokens=6)
        return
    state = ml.write(model, tokens(1, TEXT, seed=4))
    for given in ({}, {"memory_state": state}):
        expected, _ = generate(model, ids, max_new_tokens=6, **given)
        got, _ = generate(model, ids, prompt_lookup_num_tokens=2, max_new_tokens=6, **given)
        assert torch.equal(got, expected)


@torch.no_grad()
@stateful
def test_assisted_decoding_is_right_or_refused(name):
    case = llama(name)
    model, ids = case.model(), tokens(1, 7)
    expected, _ = generate(model, ids, max_new_tokens=6)
    if name not in CROPS:
        with pytest.raises((NotImplementedError, ValueError), match=says("crop")):
            generate(model, ids, assistant_model=case.base(), max_new_tokens=6)
        return
    got, _ = generate(model, ids, assistant_model=case.base(), max_new_tokens=6)
    assert torch.equal(got, expected)
