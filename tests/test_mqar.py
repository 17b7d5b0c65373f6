"""Multi-query associative recall: rows of an exact length whose answers can be read off the context, and only there."""

from __future__ import annotations

import itertools

import pytest
import torch

from memlayers.config import ConfigError, validate
from memlayers.tasks import MqarConfig, MqarTask, make_task, rng_for
from memlayers.tasks.mqar import power_law_slots
from memlayers.train.config import TaskData
from memlayers.train.data import ANSWER, QUESTION, TaskSource

CONFIGS = {
    "plain": MqarConfig(n_pairs=8),
    "by length": MqarConfig(tokens_per_pair=8),
    "few queries": MqarConfig(n_pairs=8, n_queries=3),
    "short question": MqarConfig(n_queries=4, question_length=8),
    "no first token": MqarConfig(n_pairs=8, bos=False),
    "overwrite": MqarConfig(n_pairs=8, overwrite=0.5),
    "passes": MqarConfig(n_pairs=4, passes=3, overwrite=1),
    "random filler": MqarConfig(n_pairs=8, random_filler=True, vocab_size=40),
    "large vocabulary": MqarConfig(n_pairs=8, vocab_size=8192),
}


def pairs_of(task, sample) -> list[tuple[int, int]]:
    """The (key, value) pairs of a context, in order, all passes."""
    ids = sample.context[len(task.bos) :]
    return list(zip(ids[::2], ids[1::2], strict=True))


def asked_of(sample) -> dict[int, int]:
    """Key -> value of the queries."""
    (question,) = sample.questions
    return {question.ids[at - 1]: question.ids[at] for at in question.answer_at}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [64, 65, 130])
def test_length_is_exact_and_every_answer_is_the_last_value_of_its_key(tokenizer, name, length):
    task = make_task(CONFIGS[name], tokenizer)
    for index in range(10):
        sample = task.sample(rng_for("train", 0, index), length)
        assert len(sample.context) + len(sample.questions[0].ids) == length == sample.length
        assert (sample.context[0] == tokenizer.bos_token_id) == task.config.bos
        pairs, asked = pairs_of(task, sample), asked_of(sample)
        assert all(dict(pairs)[key] == value for key, value in asked.items())
        n_pairs = task.pairs_in(length)
        assert len(dict(pairs)) == n_pairs
        assert len(asked) == len(sample.questions[0].answer_at) == (task.config.n_queries or n_pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_are_disjoint_halves_without_special_tokens(tokenizer, name):
    task = make_task(CONFIGS[name], tokenizer)
    assert max(task.keys) < min(task.values) and len(task.keys) == len(task.values)
    both = {*task.keys, *task.values}
    assert not both & {task.blank, *tokenizer.all_special_ids}
    assert max(both) < (task.config.vocab_size or len(tokenizer))
    sample = task.sample(rng_for("train", 0, 0), 64)
    for key, value in pairs_of(task, sample):
        assert key in task.keys and value in task.values
    assert task.chance == 1 / len(task.values)


def test_blanks_between_the_queries_or_tokens_that_are_no_keys_of_the_row(tokenizer):
    for filler in (False, True):
        task = make_task(MqarConfig(n_pairs=4, random_filler=filler, vocab_size=30), tokenizer)
        others = set()
        for index in range(20):
            sample = task.sample(rng_for("train", 0, index), 64)
            (question,) = sample.questions
            used = {at - step for at in question.answer_at for step in (0, 1)}
            here = {token for at, token in enumerate(question.ids) if at not in used}
            assert not here & {key for key, _ in pairs_of(task, sample)}
            others |= here
        assert others == ({*task.keys, *task.values} if filler else {task.blank})


def test_overwritten_keys_and_passes(tokenizer):
    task = make_task(MqarConfig(n_pairs=8, overwrite=0.5, passes=2), tokenizer)
    lasts, firsts = 0, 0
    for index in range(50):
        sample = task.sample(rng_for("train", 0, index), 128)
        pairs = pairs_of(task, sample)
        assert len(pairs) == 24 and pairs[:12] == pairs[12:]
        assert len({value for _, value in pairs}) == 12
        keys = [key for key, _ in pairs[:12]]
        assert sorted(keys.count(key) for key in set(keys)) == [1] * 4 + [2] * 4
        again = {key for key in keys if keys.count(key) == 2}
        lasts += keys[-1] in again
        firsts += keys[0] in again
    assert 0 < lasts < 50 and 0 < firsts < 50, "where a key is written again tells nothing"


@pytest.mark.parametrize("name", CONFIGS)
def test_without_needles_neither_key_nor_value_of_a_query_stands_in_the_context(tokenizer, name):
    task = make_task(CONFIGS[name], tokenizer)
    for index in range(10):
        sample = task.sample(rng_for("eval", 0, index), 64)
        empty = task.sample(rng_for("eval", 0, index), 64, needle=False)
        assert empty.questions == sample.questions and len(empty.context) == len(sample.context)
        asked = asked_of(sample)
        assert not {key for key, _ in pairs_of(task, empty)} & asked.keys()
        assert not {value for _, value in pairs_of(task, empty)} & set(asked.values())
        same = [a == b for a, b in zip(pairs_of(task, sample), pairs_of(task, empty))]
        assert sum(same) == sum(key not in asked for key, _ in pairs_of(task, sample))


def test_gaps_follow_the_power_law():
    n_slots, n_rows = 32, 4000
    counts = {a: [0] * n_slots for a in (0.01, 1.0)}
    for power, row in counts.items():
        for index in range(n_rows):
            (slot,) = power_law_slots(rng_for("train", 0, index), n_slots, 1, power)
            row[slot] += 1
    weights = [(slot + 1) ** (0.01 - 1) for slot in range(n_slots)]
    for slot in (0, 1, 7, 31):
        assert counts[0.01][slot] / n_rows == pytest.approx(weights[slot] / sum(weights), abs=0.02)
        assert counts[1.0][slot] / n_rows == pytest.approx(1 / n_slots, abs=0.02)
    assert sorted(power_law_slots(rng_for("train", 0, 0), 9, 9, 0.01)) == list(range(9))


def test_queries_come_in_another_order_than_the_pairs(tokenizer):
    task = make_task(MqarConfig(n_pairs=3), tokenizer)
    orders = set()
    for index in range(60):
        sample = task.sample(rng_for("train", 0, index), 13)
        keys = [key for key, _ in pairs_of(task, sample)]
        orders.add(tuple(keys.index(key) for key in asked_of(sample)))
    assert orders == set(itertools.permutations(range(3)))


def test_same_seed_same_row_and_the_splits_share_none(tokenizer):
    task = make_task(MqarConfig(n_pairs=4), tokenizer)
    first = task.sample(rng_for("train", 5, 1), 64)
    assert first == make_task(MqarConfig(n_pairs=4), tokenizer).sample(rng_for("train", 5, 1), 64)
    assert first != task.sample(rng_for("train", 5, 2), 64)
    assert first != make_task(MqarConfig(n_pairs=4), tokenizer, "eval").sample(rng_for("eval", 5, 1), 64)


def test_the_number_of_pairs_follows_the_length(tokenizer):
    task = MqarTask(MqarConfig(), tokenizer)
    assert [task.pairs_in(length) for length in (10, 65, 257)] == [1, 4, 16]
    assert task.pairs_in(task.length_for(7)) == 7
    short = MqarTask(MqarConfig(question_length=16, n_queries=8, overwrite=0.5, passes=2), tokenizer)
    for n_pairs in (1, 3, 8):
        sample = short.sample(rng_for("train", 0, 0), short.length_for(n_pairs))
        assert len(dict(pairs_of(short, sample))) == n_pairs and len(sample.questions[0].ids) >= 16
    dense = MqarTask(MqarConfig(tokens_per_pair=4), tokenizer)
    for n_pairs in (1, 5, 64):
        sample = dense.sample(rng_for("train", 0, 0), dense.length_for(n_pairs))
        assert len(asked_of(sample)) == n_pairs and dense.blank not in sample.questions[0].ids


def test_the_shortest_length_is_named_and_works(tokenizer):
    task = make_task(MqarConfig(n_pairs=4, overwrite=0.5, passes=2, n_queries=3), tokenizer)
    with pytest.raises(ValueError, match=r"length 20 is too short for 4 pairs: .* at least 31 tokens"):
        task.sample(rng_for("train", 0, 0), 20)
    assert task.sample(rng_for("train", 0, 0), 31).length == 31
    with pytest.raises(ValueError, match="too short"):
        task.sample(rng_for("train", 0, 0), 30)


def test_a_vocabulary_that_is_too_small_is_named(tokenizer):
    task = make_task(MqarConfig(n_pairs=8, overwrite=1, vocab_size=30), tokenizer)
    with pytest.raises(ValueError, match=r"vocab_size: 8 pairs, 8 of them written again, need 16 different"):
        task.sample(rng_for("train", 0, 0), 64)
    full = make_task(
        MqarConfig(n_pairs=13, vocab_size=30), tokenizer
    )  # 3 special, 1 blank, 13 keys, 13 values
    assert full.sample(rng_for("train", 0, 0), 64)
    with pytest.raises(ValueError, match="every key is asked for"):
        full.sample(rng_for("train", 0, 0), 64, needle=False)
    with pytest.raises(ConfigError, match=r"data\.task\.vocab_size: ids below 400 .* embeddings for 399"):
        MqarTask(MqarConfig(), tokenizer).check_embeddings(399, "data.task")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_pairs": 4, "tokens_per_pair": 16}, "tokens_per_pair: give this or n_pairs"),
        ({"question_length": 4, "tokens_per_pair": 16}, "tokens_per_pair: give this or question_length"),
        ({"overwrite": True}, "overwrite"),
        ({"overwrite": 1.5}, "overwrite"),
        ({"power_a": 0}, "power_a"),
        ({"n_pair": 4}, "did you mean 'n_pairs'"),
    ],
)
def test_wrong_fields_are_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        MqarConfig(**fields)


@pytest.mark.parametrize("regime", ["D", "W"])
def test_labels_of_a_batch_stand_at_the_values_alone(tokenizer, regime):
    data = validate(TaskData, {"task": {"type": "mqar", "n_pairs": 4}, "regime": regime, "segments": 2})
    source = TaskSource(data, tokenizer, segment_length=32, batch_size=3, seed=0)
    batch = source.batch(0, segments=2)
    assert not source.by_item and batch.attention_mask is None
    assert batch.input_ids.shape[1] + (batch.context_ids.shape[1] if regime == "D" else 0) == 64
    for row, (ids, parts) in enumerate(zip(batch.input_ids, batch.parts)):
        sample = source.task.sample(rng_for("train", 0, row), 64)
        (question,) = sample.questions
        before = 0 if regime == "D" else len(sample.context)
        assert torch.where(parts == ANSWER)[0].tolist() == [before + at for at in question.answer_at]
        assert (parts[before:] == QUESTION).sum() == len(question.ids) - 4
        assert ids[parts == ANSWER].tolist() == list(asked_of(sample).values())
