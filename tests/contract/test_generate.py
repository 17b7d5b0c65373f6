"""Contract 5: generation with the cache equals a full recompute of the same text."""

import pytest
import torch
from matrix import SEGMENT, TEXT, cases, llama, near, pad, positions, same_state, tokens

import memlayers as ml
from memlayers.core.model import stateful

STATEFUL = (lambda kind: kind.stateful, "keeps no state")
PROMPT, NEW = SEGMENT + 3, 9  # the prompt ends inside its second segment, the answer crosses two segment ends


def generate(model, ids, new=NEW, mask=None, **options):
    """Ids of the answer (rows, new), its logits before any processing (rows, new, vocab), and the output."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, 1), output


def reads_in_segments(model):
    return any(memory.schedule.kv == "drop" for memory in stateful(model).values())


def recompute(model, ids, answer, state=None, writes=False):
    """Logits for each token of `answer` without any cache: the text so far in one call when decoding writes or
    nothing is ever written, else the prompt in one call and the answer in one more, which writes nothing."""
    if writes or (state is None and not reads_in_segments(model)):
        whole = model(torch.cat([ids, answer[:, :-1]], 1), memory_state=state, use_cache=False).logits
        return whole[:, ids.shape[1] - 1 :]
    prompt = model(ids, memory_state=state, use_cache=False)
    rest = model(answer[:, :-1], memory_state=prompt.memory_state, write_memory=False, use_cache=False).logits
    return torch.cat([prompt.logits[:, -1:], rest], 1)


@torch.no_grad()
@cases(scope="all")
def test_greedy(case):
    model, ids = case.model(), case.tokens(2, PROMPT)
    answer, logits, output = generate(model, ids)
    near(logits, recompute(model, ids, answer, writes=case.kind.in_one_call))
    assert torch.equal(answer, logits.argmax(-1))
    cache = output.past_key_values
    assert isinstance(cache, ml.MemoryCache) == case.kind.stateful
    assert cache.get_seq_length() == PROMPT + NEW - 1


@torch.no_grad()
@cases(*STATEFUL)
def test_greedy_from_a_written_state(case):
    model, question = case.model(), tokens(2, 2, seed=4)  # short, so that a sliding window reaches memory
    state = ml.write(model, tokens(2, TEXT))
    kept = state.clone()
    answer, logits, _ = generate(model, question, past_key_values=state.to_cache())
    near(logits, recompute(model, question, answer, state, writes=case.kind.in_one_call))
    same_state(state, kept, tolerance=0)  # the value given is never changed in place
    again, _, _ = generate(model, question, memory_state=state)
    assert torch.equal(again, answer)
    _, fresh_logits, _ = generate(model, question, new=1)
    assert (fresh_logits[:, 0] - logits[:, 0]).abs().max() > 1e-3, "the state was not read"


@torch.no_grad()
@cases(lambda kind: kind.segmented and not kind.decoding_writes, "writes while decoding")
def test_decoding_leaves_what_is_written_as_it_is(case):
    model, ids = case.model(), tokens(2, PROMPT)
    prompt = model(ids).memory_state
    _, _, output = generate(model, ids)
    after = output.past_key_values.memory_state
    for name in case.kind.configs:
        for field, tensor in prompt[name].items():
            assert torch.equal(after[name][field], tensor), (name, field)
    assert after["pending"]["length"].tolist() == [PROMPT % SEGMENT + NEW - 1] * 2


@torch.no_grad()
@cases(lambda kind: kind.decoding_writes, "does not write while decoding")
def test_decoding_writes_what_a_prompt_would(case):
    model, ids = case.model(), tokens(2, PROMPT)
    answer, _, output = generate(model, ids)
    expected = model(torch.cat([ids, answer[:, :-1]], 1)).memory_state
    same_state(output.past_key_values.memory_state, expected)


@torch.no_grad()
@cases(scope="all")
def test_beams(case):
    """The score that beam search gives a sequence is the sum of log-probabilities under a full recompute:
    after reordering, each beam still has its own memory and window."""
    model, ids, beams = case.model(), case.tokens(2, PROMPT), 3
    _, _, output = generate(
        model, ids, new=NEW, num_beams=beams, num_return_sequences=beams, length_penalty=0.0
    )
    prompt, answer = ids.repeat_interleave(beams, 0), output.sequences[:, PROMPT:]
    logits = recompute(model, prompt, answer, writes=case.kind.in_one_call)
    scores = logits.log_softmax(-1).gather(2, answer[..., None]).sum((1, 2))
    near(output.sequences_scores, scores, 1e-3)


@torch.no_grad()
@cases(*STATEFUL)
def test_beams_from_a_written_state(case):
    model, question, beams = case.model(), tokens(2, 5, seed=4), 3
    state = ml.write(model, tokens(2, TEXT))
    cache = state.select([0, 0, 0, 1, 1, 1]).to_cache()
    _, _, output = generate(
        model, question, new=NEW, num_beams=beams, past_key_values=cache, length_penalty=0.0
    )
    answer = output.sequences[:, question.shape[1] :]
    logits = recompute(model, question, answer, state, writes=case.kind.in_one_call)
    scores = logits.log_softmax(-1).gather(2, answer[..., None]).sum((1, 2))
    near(output.sequences_scores, scores, 1e-3)


@torch.no_grad()
@cases()
def test_chunked_prefill_at_every_size(case):
    model, ids = case.model(), case.tokens(2, PROMPT)
    expected, expected_logits, _ = generate(model, ids, new=4)
    for size in range(1, PROMPT + 1):
        answer, logits, _ = generate(model, ids, new=4, prefill_chunk_size=size)
        near(logits, expected_logits)
        assert torch.equal(answer, expected), size


@torch.no_grad()
@cases(scope="all")
def test_two_calls_split_at_every_offset(case):
    """With and without keys and values handed on, at every offset: the same logits and the same state."""
    model, ids = case.model(), case.tokens(2, TEXT)
    whole = model(ids)
    for offset in range(1, ids.shape[1]):
        first = model(ids[:, :offset], use_cache=True)
        given = [{"past_key_values": first.past_key_values}]
        given += [{"memory_state": first.memory_state}] if case.kind.segmented and offset % 4 == 0 else []
        for state in given[::-1]:
            second = model(ids[:, offset:], write_memory=True, **state)
            near(torch.cat([first.logits, second.logits], 1), whole.logits)
            if case.kind.stateful:
                same_state(second.memory_state, whole.memory_state)


@torch.no_grad()
@cases()
def test_split_of_a_padded_batch_at_every_offset(case):
    """The first call of a left-padded row may be padding only."""
    model = case.model()
    ids, mask = pad([tokens(1, TEXT, seed=1)[0], tokens(1, 4, seed=2)[0]], "left")
    place = positions(case, mask)
    whole = model(ids, attention_mask=mask, **place)
    for offset in range(1, ids.shape[1], 2):
        before, after = (
            {k: p[:, part] for k, p in place.items()} for part in (slice(offset), slice(offset, None))
        )
        first = model(ids[:, :offset], attention_mask=mask[:, :offset], use_cache=True, **before)
        second = model(
            ids[:, offset:],
            attention_mask=mask,
            past_key_values=first.past_key_values,
            write_memory=True,
            **after,
        )
        got = torch.cat([first.logits, second.logits], 1)
        near(got[mask.bool()], whole.logits[mask.bool()])


@torch.no_grad()
@cases()
def test_left_padded_generation_is_each_row_alone(case):
    model = case.model()
    rows = [tokens(1, length, seed=length)[0] for length in (PROMPT, 3, SEGMENT)]
    ids, mask = pad(rows, "left")
    answer, logits, _ = generate(model, ids, mask=mask)
    for index, row in enumerate(rows):
        alone, alone_logits, _ = generate(model, row[None])
        near(logits[index], alone_logits[0])
        assert torch.equal(answer[index], alone[0])


@torch.no_grad()
@cases(lambda kind: kind.decoding_writes, "without a cache the answer is read like a prompt")
def test_generation_without_a_cache_across_segments(case):
    model, ids = case.model(), tokens(2, PROMPT)
    cached, logits, _ = generate(model, ids)
    plain, plain_logits, _ = generate(model, ids, use_cache=False)
    near(plain_logits, logits)
    assert torch.equal(plain, cached)


@torch.no_grad()
@cases()
def test_generation_without_a_cache_inside_a_segment(case):
    model, ids = case.model(), tokens(2, SEGMENT + 1)
    given_states = [{}]
    if case.kind.stateful:
        given_states.append({"memory_state": ml.write(model, tokens(2, TEXT, seed=6))})
    for given in given_states:
        cached, logits, _ = generate(model, ids, new=4, **given)
        plain, plain_logits, _ = generate(model, ids, new=4, use_cache=False, **given)
        near(plain_logits, logits)
        assert torch.equal(plain, cached)


@torch.no_grad()
@cases(*STATEFUL)
def test_a_second_turn_on_the_same_cache(case):
    """The second prompt is read and written like any prompt, the first answer before it as what it was."""
    model, ids = case.model(), tokens(2, PROMPT)
    answer, _, output = generate(model, ids, new=5)
    cache, turn = output.past_key_values, tokens(2, 4, seed=8)
    state = cache.memory_state.clone()
    text = torch.cat([output.sequences, turn], 1)
    second, logits, _ = generate(model, text, past_key_values=cache)
    if not case.kind.segmented:  # attention still has the first turn
        near(logits, recompute(model, text, second, writes=True))
        return
    unread = torch.cat([answer[:, -1:], turn], 1)  # the last token of an answer is never fed back
    near(logits, recompute(model, unread, second, state, writes=case.kind.in_one_call))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"do_sample": True}, {"cache_implementation": "static"}], ids=str)
def test_other_ways_to_generate(options):
    case = llama()
    model, ids = case.model(), tokens(2, PROMPT)
    torch.manual_seed(0)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )
    near(torch.stack(output.logits, 1), recompute(model, ids, output.sequences[:, PROMPT:]))
