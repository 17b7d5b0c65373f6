"""Contract 4: padding changes nothing, rows do not see each other, the future does not reach the past."""

import pytest
import torch
from matrix import SEGMENT, TEXT, another, cases, near, pad, positions, same_state, tokens

import memlayers as ml

# Two full segments and some; less than one; exactly two; exactly one; one and a token.
LENGTHS = [TEXT, 3, 2 * SEGMENT, SEGMENT, SEGMENT + 1]


def rows():
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


@pytest.mark.parametrize(
    ("side", "close"),
    [("left", False), ("left", True), ("right", True)],
    ids=["left", "left_closed", "right_closed"],
)
@cases(scope="all")
def test_a_padded_batch_is_each_row_alone(case, side, close):
    model = case.model()
    ids, mask = pad(rows(), side)
    question = tokens(len(LENGTHS), 4, seed=99)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, close_memory=close, **positions(case, mask))
        alone = [model(row[None], close_memory=close) for row in rows()]
        for index, one in enumerate(alone):
            near(batch.logits[index][mask[index].bool()], one.logits[0])
        if case.kind.stateful:
            answers = model(question, memory_state=batch.memory_state).logits
            for index, one in enumerate(alone):
                near(answers[index], model(question[index][None], memory_state=one.memory_state).logits[0])


@cases(lambda kind: kind.segmented, "a sliding window counts padding in the middle of a text")
def test_padding_may_stand_anywhere(case):
    model, ids = case.model(), tokens(2, TEXT)
    scattered, mask = torch.full((2, TEXT + 8), 300), torch.zeros(2, TEXT + 8, dtype=torch.int64)
    for row in range(2):
        keep = torch.randperm(TEXT + 8, generator=torch.Generator().manual_seed(row))[:TEXT].sort().values
        scattered[row, keep], mask[row, keep] = ids[row], 1
    with torch.no_grad():
        expected, got = model(ids), model(scattered, attention_mask=mask)
    near(got.logits[mask.bool()].view(2, TEXT, -1), expected.logits)


@cases()
def test_what_stands_at_padding_does_not_matter(case):
    model = case.model()
    ids, mask = pad(rows(), "left")
    other = torch.where(mask.bool(), ids, 400)
    with torch.no_grad():
        a, b = model(ids, attention_mask=mask), model(other, attention_mask=mask)
    assert torch.equal(a.logits[mask.bool()], b.logits[mask.bool()])
    if case.kind.stateful:
        same_state(a.memory_state, b.memory_state, tolerance=0)


@cases()
def test_rows_do_not_see_each_other(case):
    model = case.model()
    ids, mask = pad(rows(), "left")
    changed = ids.clone()
    changed[0] = tokens(1, ids.shape[1], seed=7)[0]
    with torch.no_grad():
        a, b = model(ids, attention_mask=mask), model(changed, attention_mask=mask)
    assert (a.logits[0] - b.logits[0]).abs().max() > 1e-2
    assert torch.equal(a.logits[1:][mask[1:].bool()], b.logits[1:][mask[1:].bool()])
    if case.kind.stateful:
        others = range(1, len(LENGTHS))
        same_state(a.memory_state.select(others), b.memory_state.select(others), tolerance=0)


@cases()
def test_the_future_does_not_reach_the_past(case):
    model, ids = case.model(), tokens(1, TEXT)
    with torch.no_grad():
        before = model(ids).logits
        for place in (2, SEGMENT - 1, SEGMENT, 7, 2 * SEGMENT, TEXT - 1):
            changed = ids.clone()
            changed[0, place] = another(ids[0, place])
            after = model(changed).logits
            assert torch.equal(after[:, :place], before[:, :place]), place
            assert not torch.equal(after[:, place:], before[:, place:]), place


@cases(lambda kind: kind.stateful, "keeps no state")
def test_the_past_reaches_the_future_through_memory_alone(case):
    """What was written moves what is read next; with the state in between at zero it does not."""
    model, ids = case.model(), tokens(1, 2 * SEGMENT)
    question, changed = tokens(1, 5, seed=5), ids.clone()
    changed[:, SEGMENT:] = tokens(1, SEGMENT, seed=6)
    with torch.no_grad():
        a, b = ml.write(model, ids), ml.write(model, changed)
        moved = model(question, memory_state=a).logits - model(question, memory_state=b).logits
        assert moved.abs().max() > 1e-3
        zeros = [model(question, memory_state=s.zeros_like()).logits for s in (a, b)]
    assert torch.equal(*zeros)


@cases(lambda kind: kind.stateful, "keeps no state")
def test_a_row_without_a_token_keeps_its_state(case):
    model, ids = case.model(), tokens(2, TEXT)
    with torch.no_grad():
        state = ml.write(model, ids)
        mask = torch.tensor([[1] * 10, [0] * 10])
        output = model(tokens(2, 10, 3), attention_mask=mask, memory_state=state, close_memory=True)
        assert output.logits.isfinite().all()
        after = output.memory_state
        if case.kind.by_gradient:
            after = ml.write(model, tokens(2, 10, 3), state, attention_mask=mask)
        question = tokens(2, 4, 9)
        expected = model(question, memory_state=state).logits
        got = model(question, memory_state=after).logits
    near(got[1], expected[1])
    assert (got[0] - expected[0]).abs().max() > 1e-3
