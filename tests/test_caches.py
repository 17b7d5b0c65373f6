"""Caches that the caller made: memory rides on them, and what is done to them is done to memory."""

import copy
import pickle

import pytest
import torch
from cache_cases import CACHES, CROPS, STATEFUL, stateful
from matrix import TEXT, llama, near, same_state, says, tokens, wrap
from transformers import DynamicCache

import memlayers as ml

made = pytest.mark.parametrize("make", list(CACHES))
FOLLOW = 3


def follow(rows=2):
    return tokens(rows, FOLLOW, seed=9)


def read(model, cache, rows=2):
    """Logits and state of a few tokens more."""
    output = model(follow(rows), past_key_values=cache, use_cache=True)
    return output.logits, output.memory_state


def filled(model, make="plain", rows=2, seed=0):
    """The caller's own object after a written state and a text were read with it."""
    cache = CACHES[make](model)
    state = ml.write(model, tokens(rows, TEXT, seed=20 + seed))
    output = model(tokens(rows, TEXT, seed=seed), past_key_values=cache, memory_state=state, use_cache=True)
    assert output.past_key_values is cache
    return cache


def reference(model, rows=2, seed=0):
    """The same without a cache of the caller's."""
    state = ml.write(model, tokens(rows, TEXT, seed=20 + seed))
    first = model(tokens(rows, TEXT, seed=seed), memory_state=state, use_cache=True)
    return read(model, first.past_key_values, rows)


@torch.no_grad()
@made
@stateful
def test_a_text_goes_on_with_it(name, make):
    model = llama(name).model()
    cache = filled(model, make)
    assert cache.get_seq_length() == TEXT and cache.batch_size == 2
    assert (cache or None) is cache
    (got, state), (expected, expected_state) = read(model, cache), reference(model)
    near(got, expected)
    same_state(state, expected_state)
    assert cache.get_seq_length() == TEXT + FOLLOW
    same_state(cache.memory_state, expected_state)
    with ml.disabled(model):  # memory moves these logits
        assert (model(torch.cat([tokens(2, TEXT), follow()], 1)).logits[:, -FOLLOW:] - got).abs().max() > 1e-2


@torch.no_grad()
@made
@stateful
def test_reset_forgets_text_and_memory(name, make):
    model = llama(name).model()
    cache = filled(model, make)
    cache.reset()
    assert cache.get_seq_length() == 0
    got, state = read(model, cache)
    expected = model(follow())
    near(got, expected.logits)
    same_state(state, expected.memory_state)


@torch.no_grad()
@stateful
def test_a_cache_that_was_reset_serves_another_model(name):
    one, other = llama(name).model(), llama("recurrent").model()
    cache = filled(one)
    cache.reset()
    near(read(other, cache)[0], other(follow()).logits)


@torch.no_grad()
@made
@stateful
def test_rows_are_reordered_selected_and_repeated(name, make):
    model = llama(name).model()
    expected, expected_state = reference(model, rows=3)

    order = torch.tensor([2, 2, 0])
    cache = filled(model, make, rows=3)
    cache.reorder_cache(order)
    output = model(follow(3)[order], past_key_values=cache)
    near(output.logits, expected[order])
    same_state(output.memory_state, expected_state.select(order))

    cache = filled(model, make, rows=3)
    cache.batch_select_indices(torch.tensor([1]))
    output = model(follow(3)[1:2], past_key_values=cache)
    near(output.logits, expected[1:2])
    assert output.memory_state.batch_size == cache.batch_size == 1

    cache = filled(model, make, rows=3)
    cache.batch_repeat_interleave(2)
    output = model(follow(3).repeat_interleave(2, 0), past_key_values=cache)
    near(output.logits, expected.repeat_interleave(2, 0))


@torch.no_grad()
@made
@pytest.mark.parametrize("name", CROPS)
def test_crop_takes_the_last_tokens_back(name, make):
    model = llama(name).model()
    cache = filled(model, make)
    assert cache.is_croppable
    before = cache.memory_state.clone()
    model(tokens(2, 4, seed=5), past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == TEXT
    near(read(model, cache)[0], reference(model)[0])
    same_state(cache.memory_state, before, 0)
    cache.crop(0)
    assert cache.get_seq_length() == TEXT + FOLLOW
    with pytest.raises(ValueError):
        cache.crop(2)
    assert cache.get_seq_length() == TEXT + FOLLOW


@torch.no_grad()
@made
@pytest.mark.parametrize("name", [name for name in STATEFUL if name not in CROPS])
def test_crop_is_refused_where_what_was_read_is_in_memory(name, make):
    model = llama(name).model()
    cache = filled(model, make)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match=says("MemoryCache", "cannot be cropped", "state.clone()")):
        cache.crop(-1)
    near(read(model, cache)[0], reference(model)[0])


@torch.no_grad()
@made
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@stateful
def test_a_copy_is_a_cache_of_its_own(name, copied, make):
    """The recipe "re-use a cache": one prompt, several texts behind it."""
    model = llama(name).model()
    cache = filled(model, make)
    copies = [copied(cache) for _ in range(2)]
    model(tokens(2, 4, seed=6), past_key_values=copies[0])
    expected, _ = reference(model)
    near(read(model, copies[1])[0], expected)
    near(read(model, cache)[0], expected)


@torch.no_grad()
@stateful
def test_a_filled_cache_is_refused_and_left_alone(name):
    model, ids = llama(name).model(), tokens(2, TEXT)
    cache = DynamicCache()
    with ml.disabled(model):
        model(ids, past_key_values=cache)
        expected = model(follow(), past_key_values=copy.deepcopy(cache)).logits
    for call in (model, model.model):
        with pytest.raises(
            ValueError, match=says(f"holds {TEXT} tokens read without memory", "state.to_cache()")
        ):
            call(follow(), past_key_values=cache)
    assert type(cache) is DynamicCache
    with ml.disabled(model):
        near(model(follow(), past_key_values=cache).logits, expected)


@torch.no_grad()
@stateful
def test_a_cache_with_memory_is_refused_where_memory_is_disabled(name):
    model = llama(name).model()
    cache = filled(model)
    for call in (model, model.model):
        with (
            ml.disabled(model),
            pytest.raises(ValueError, match=says("MemoryCache", "disabled", "plain cache")),
        ):
            call(follow(), past_key_values=cache)
    near(read(model, cache)[0], reference(model)[0])


class Mine(DynamicCache):
    """A cache with ideas of its own, which memory would take away from it."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(keys.clone(), values, layer_idx, *args, **kwargs)


@torch.no_grad()
@stateful
def test_a_users_subclass_is_refused(name):
    model, cache = llama(name).model(), Mine()
    for call in (model, model.model):
        with pytest.raises(ValueError, match=says("Mine", "cannot carry memory", "state.to_cache()")):
            call(follow(), past_key_values=cache)
    with pytest.raises(ValueError, match="Mine"):
        model.generate(follow(), past_key_values=cache, max_new_tokens=2)
    assert type(cache) is Mine


@torch.no_grad()
@stateful
def test_a_cache_of_another_model_is_refused(name):
    case = llama(name)
    model, other = case.model(), case.model()
    cache = filled(other)
    for call in (model, model.model):
        with pytest.raises(ValueError, match=says("another model", "cache.memory_state.to_cache()")):
            call(follow(), past_key_values=cache)
    near(read(other, cache)[0], reference(other)[0])  # it is still the other's
    got = model(follow(), past_key_values=cache.memory_state.to_cache(), use_cache=True)
    near(got.logits, model(follow(), memory_state=cache.memory_state).logits)


@torch.no_grad()
@stateful
def test_a_cache_from_before_detach(name):
    """Attention's keys and values were made with a memory that is gone."""
    case = llama(name)
    model = case.model()
    cache = filled(model)
    ml.detach(model)
    wrap(model, llama("neural_mal" if name == "recurrent" else "recurrent").kind)
    with pytest.raises(ValueError, match="another model"):
        model(follow(), past_key_values=cache)
    cache.reset()
    near(read(model, cache)[0], model(follow()).logits)
    cache = filled(wrap(ml.detach(model), case.kind))
    ml.detach(model)
    with pytest.raises(ValueError, match=says("MemoryCache", "no memory", "plain cache")):
        model(follow(), past_key_values=cache)


@torch.no_grad()
@stateful
def test_a_call_that_is_refused_leaves_the_cache_alone(name):
    model = llama(name).model()
    cache, wrong = DynamicCache(), ml.write(model, tokens(1, TEXT))
    for call in (model, model.model):
        with pytest.raises(ValueError, match=says("1 rows", "2")):
            call(follow(), past_key_values=cache, memory_state=wrong)
    right = ml.write(model, tokens(2, TEXT))
    got = model(follow(), past_key_values=cache, memory_state=right).logits
    near(got, model(follow(), memory_state=right).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["product_key", "task_tokens"])
def test_a_cache_without_memory_stays_as_it_is(name):
    case = llama(name)
    model, ids = case.model(), case.tokens(2, TEXT)
    for cache in (DynamicCache(), DynamicCache(config=model.config), Mine()):
        kind = type(cache)
        model(ids[:, :7], past_key_values=cache)
        assert type(cache) is kind and cache.get_seq_length() == 7
        near(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])
        cache.crop(-(TEXT - 7))
        near(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])
