"""`write`: pieces equal the whole, whole equals `forward`, and memory stays constant however long the text."""

import gc
import itertools

import psutil
import pytest
import torch
from matrix import ARCHITECTURES, SEGMENT, TEXT, Case, Kind, cases, llama, near, pad, same_state, tokens

import memlayers as ml
from memlayers.write import SEGMENTS_PER_CALL

LONG = 2 * SEGMENTS_PER_CALL * SEGMENT + 3 * SEGMENT + 2  # more than two calls of the decoder


def steady(kind="recurrent"):
    """A model in float64. Over many segments a random model turns float32 rounding (a row alone and in a batch
    are summed in another order) from 1e-7 into 1; float64 leaves nothing that would survive the state's float32."""
    return Case(llama(kind).kind, next(a for a in ARCHITECTURES if a.name == "gpt2")).model().double()


@torch.no_grad()
@pytest.mark.parametrize("close", [True, False], ids=["closed", "open"])
@cases(lambda kind: kind.stateful and not kind.by_gradient, "forward calls do not write")
def test_write_equals_forward(case, close):
    model, ids = case.model(), tokens(2, TEXT)
    same_state(ml.write(model, ids, close=close), model(ids, close_memory=close).memory_state)


@torch.no_grad()
@pytest.mark.parametrize("close", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("cuts", [[1], [SEGMENT], [7, 40], [LONG - 1], [80, 81, 160], [3, 6, 9, 12]], ids=str)
def test_pieces_equal_the_whole(cuts, close):
    model, ids = llama().model(), tokens(2, LONG)
    expected, state = ml.write(model, ids, close=close), None
    bounds = [0, *cuts, LONG]
    for start, stop in itertools.pairwise(bounds):
        state = ml.write(model, ids[:, start:stop], state, close=close and stop == LONG)
    same_state(state, expected)
    same_state(expected, model(ids, close_memory=close).memory_state)


@torch.no_grad()
@pytest.mark.parametrize("close", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["recurrent", "accumulate"])
def test_rows_of_different_length_over_several_calls(kind, side, close):
    """Some rows end calls before others: each is left as it would be alone, open segment included."""
    model = steady(kind)
    call = SEGMENTS_PER_CALL * SEGMENT
    rows = [tokens(1, n, seed=n)[0] for n in (LONG, 3, call, call + 2, 2 * call, SEGMENT)]
    ids, mask = pad(rows, side)
    state = ml.write(model, ids, attention_mask=mask, close=close)
    same_state(state, model(ids, attention_mask=mask, close_memory=close).memory_state)
    question = tokens(len(rows), 4, seed=9)
    logits = model(question, memory_state=state).logits
    for index, row in enumerate(rows):
        alone = ml.write(model, row[None], close=close)
        near(logits[index], model(question[index][None], memory_state=alone).logits[0], 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("pending", [1, SEGMENT, 3 * SEGMENT + 2, 17 * SEGMENT + 3, 40 * SEGMENT + 1])
def test_writing_goes_on_after_an_open_segment(pending):
    """Tokens that decoding left unwritten, be they more than one call of `write` takes, come first."""
    case = Case(
        Kind("long", {"stream": ml.MemoryTokensConfig(n_tokens=2, segment_length=SEGMENT)}), ARCHITECTURES[0]
    )
    model = case.model()
    model.config.max_position_embeddings = 4096  # the open segment of this test is longer than the tiny model
    first, more = tokens(2, pending), tokens(2, 93, seed=2)
    state = model(first[:, :1]).memory_state
    if pending > 1:
        state = model(first[:, 1:], memory_state=state, write_memory=False).memory_state
    assert state["pending"]["length"].tolist() == [pending] * 2
    same_state(ml.write(model, more, state), ml.write(model, torch.cat([first, more], 1)))


@torch.no_grad()
def test_rows_with_different_open_segments():
    model = steady()
    firsts, seconds = [2, SEGMENT, 4], [100, 7, 83]
    a = [tokens(1, n, seed=n) for n in firsts]
    b = [tokens(1, n, seed=n + 1) for n in seconds]
    state = ml.MemoryState.cat([ml.write(model, ids, close=False) for ids in a])
    ids, mask = pad([row[0] for row in b], "left")
    for close in (True, False):
        got = ml.write(model, ids, state, attention_mask=mask, close=close)
        alone = ml.MemoryState.cat(
            [ml.write(model, torch.cat(pair, 1), close=close) for pair in zip(a, b, strict=True)]
        )
        same_state(got, alone)


@torch.no_grad()
def test_padding_anywhere_and_a_row_of_padding_only():
    model, ids = steady(), tokens(3, 30)
    mask = (torch.rand(3, 30, generator=torch.Generator().manual_seed(0)) < 0.7).long()
    mask[2] = 0
    state = ml.write(model, ids, attention_mask=mask)
    for row in range(2):
        alone = ml.write(model, ids[row : row + 1][:, mask[row].bool()])
        same_state(state.select([row]), alone)
    fresh = ml.memories(model)["stream"].new_state(1)["memory"]
    assert torch.equal(state.select([2])["stream"]["memory"], fresh)


@torch.no_grad()
def test_write_keeps_no_gradient_and_shows_progress(capsys):
    model = llama().model()
    with torch.enable_grad():
        state = ml.write(model, tokens(1, LONG), progress=True)
    assert not any(t.requires_grad for part in state.fields.values() for t in part.values())
    assert f"{LONG}/{LONG}" in capsys.readouterr().err


@torch.no_grad()
def test_memory_stays_constant_over_a_long_text():
    """Resident memory after the first tenth of 60,000 tokens grows by less than 10 MB: keeping hidden states of
    width 32 for the text would take 7 MB a layer, keeping keys, values and graph several times that."""
    config = ml.MemoryTokensConfig(n_tokens=2, segment_length=64)
    model = Case(Kind("long", {"stream": config}), ARCHITECTURES[0]).model()
    process, state, sizes = psutil.Process(), None, []
    for index in range(10):
        state = ml.write(model, tokens(1, 6000, seed=index), state, close=False)
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert max(sizes[1:]) - sizes[0] < 10e6, [size // 1000 for size in sizes]
    assert state.nbytes < 20_000
