"""The regimes on a random model: batching and cloning change nothing, each condition gives the model what it should."""

from __future__ import annotations

import pytest
import torch

import memlayers as ml
from memlayers.eval.probes import Prober
from memlayers.tasks import NeedleConfig, PasskeyConfig, make_task, rng_for

WINDOW = 32


@pytest.fixture
def wrapped(tiny_llama):
    config = ml.MemoryTokensConfig(n_tokens=4, segment_length=WINDOW)
    memory = ml.attach(tiny_llama, config, name="stream")
    torch.manual_seed(1)
    for parameter in memory.parameters():  # so that what was written shows in the answers
        torch.nn.init.normal_(parameter, std=1.0)
    for parameter in tiny_llama.get_decoder().parameters():
        parameter.data.mul_(4)
    return tiny_llama


@pytest.fixture
def samples(tokenizer):
    task = make_task(NeedleConfig(n_keys=2, n_questions=2, digits=3), tokenizer, "eval")
    return [task.sample(rng_for("eval", 0, index), 180) for index in range(5)]


def one_by_one(model, tokenizer, inputs: list[int], n_new: int, state=None) -> str:
    """Greedy decoding by the plainest way: one row, no padding."""
    cache = {} if state is None else {"past_key_values": state.clone().to_cache()}
    ids = torch.tensor([inputs])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False, **cache
    )
    return tokenizer.decode(out[0, len(inputs) :], skip_special_tokens=True)


def test_from_memory_equals_writing_and_asking_each_haystack_alone(wrapped, tokenizer, samples):
    prober = Prober(wrapped, tokenizer, batch_size=3, margin=2)
    (answers,) = prober.from_memory(samples)
    n_new = max(len(q.answer_ids) for s in samples for q in s.questions) + 2
    for sample, texts in zip(samples, answers):
        state = ml.write(wrapped, torch.tensor([sample.context]))
        for question, text in zip(sample.questions, texts):
            alone = one_by_one(wrapped, tokenizer, question.ids, n_new, state)
            assert text and alone.startswith(text)
    assert len({text for texts in answers for text in texts}) > 1


def test_shuffled_and_zeroed_states(wrapped, tokenizer, samples):
    passkeys = make_task(PasskeyConfig(), tokenizer, "eval")
    items = [passkeys.sample(rng_for("eval", 0, index), 120) for index in range(4)]
    prober = Prober(wrapped, tokenizer, batch_size=4)
    true, shuffled, zeroed = prober.from_memory(items, [None, "shuffled_memory", "zeroed_memory"])
    assert shuffled == true[1:] + true[:1]  # one question for all: item i says what item i + 1 would say
    assert len({text for (text,) in zeroed}) == 1
    assert true == prober.from_memory(items)[0], "asking changed the state"
    with pytest.raises(ValueError, match="two haystacks"):
        prober.from_memory(items[:1], ["shuffled_memory"])


def test_memory_reaches_the_answer_only_through_the_state(wrapped, tokenizer, samples):
    """Two contexts that share their last window but not their start are told apart by memory and by the stream."""
    passkeys = make_task(PasskeyConfig(), tokenizer, "eval")
    items = [passkeys.sample(rng_for("eval", 0, index), 150, depth=0.0) for index in range(6)]
    prober = Prober(wrapped, tokenizer)
    assert len({text for (text,) in prober.from_memory(items)[0]}) > 1
    assert len({text for (text,) in prober.in_one_call(items)}) > 1
    assert len({text for (text,) in prober.question_only(items)}) == 1


def test_in_one_call_equals_each_row_alone_and_cuts_on_the_left(tiny_llama, tokenizer, samples):
    prober = Prober(tiny_llama, tokenizer, batch_size=4, margin=1)
    n_new = max(len(q.answer_ids) for s in samples for q in s.questions) + 1
    for last in (None, WINDOW):
        answers = prober.in_one_call(samples, last=last)
        for sample, texts in zip(samples, answers):
            for question, text in zip(sample.questions, texts):
                inputs = sample.context + question.ids
                inputs = inputs if last is None else inputs[-last:]
                assert one_by_one(tiny_llama, tokenizer, inputs, n_new).startswith(text)


def test_uneven_batches_leave_no_haystack_alone(wrapped, tokenizer):
    passkeys = make_task(PasskeyConfig(), tokenizer, "eval")
    items = [passkeys.sample(rng_for("eval", 0, index), 64) for index in range(7)]
    for batch_size in (1, 2, 3, 6):
        true, shuffled = Prober(wrapped, tokenizer, batch_size).from_memory(items, [None, "shuffled_memory"])
        assert len(true) == len(shuffled) == 7
        assert sorted(true) == sorted(shuffled)


def test_margin_gives_way_at_the_end_of_the_positions(tiny_llama, tokenizer):
    passkeys = make_task(PasskeyConfig(), tokenizer, "eval")
    item = passkeys.sample(rng_for("eval", 0, 0), 256)
    seen = []
    generate = tiny_llama.generate
    tiny_llama.generate = lambda ids, **kw: (
        seen.append((ids.shape[1], kw["generation_config"].max_new_tokens)) or generate(ids, **kw)
    )
    Prober(tiny_llama, tokenizer, margin=50).in_one_call([item])
    assert seen == [(256 - len(item.questions[0].answer_ids), len(item.questions[0].answer_ids))]
