"""The reversible memory of a model: what is written and read back, and its loss."""

import pytest
import torch
from matrix import llama, pad, says, tokens

import memlayers as ml
from memlayers.config import ConfigError

FIELDS = {"n_tokens": 2, "ratios": [3], "heads": 4, "depth": 2}
SIZE = 6


def wrapped(**fields):
    model = llama().base()
    torch.manual_seed(1)
    return model, ml.attach(model, ml.ReversibleMemoryConfig(**{**FIELDS, **fields}), name="past")


def rows_of(*lengths: int) -> list[torch.Tensor]:
    return [tokens(1, length, seed=length)[0] for length in lengths]


def trained(steps: int = 60, rate: float = 2e-2, **fields):
    """A model whose memory gives back texts of twenty tokens, and the losses on the way."""
    model, memory = wrapped(**fields)
    optimizer, losses = torch.optim.AdamW(memory.parameters(), lr=rate), []
    for step in range(steps):
        ids = tokens(32, SIZE, seed=step) % 20 + 300
        loss = memory.extra_loss(model, ids, torch.ones_like(ids, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
@pytest.mark.parametrize("ratios", [[3], [3, 1]])
def test_the_cycle_loss_by_hand(ratios):
    """Segment by segment, and each row without its padding."""
    model, memory = wrapped(ratios=ratios)
    rows = rows_of(2 * SIZE + 2, 3, SIZE)
    ids, mask = pad(rows, "left")
    std, losses = memory.log_std.exp(), [[] for _ in ratios]
    table = model.get_input_embeddings().weight / std
    for row in rows:
        for piece in row.split(SIZE):
            x, used = torch.zeros(1, SIZE, 32), torch.arange(SIZE)[None] < len(piece)
            x[0, : len(piece)] = model.get_input_embeddings()(piece) / std
            for level, stored in enumerate(memory.compressor.compress_by_level(x, used)):
                back = memory.compressor.restore(stored, used, level)[0, : len(piece)]
                scores = -(back[:, None] - table).square().sum(-1) / (2 * 32**0.5)
                losses[level] += (-scores.log_softmax(-1)).gather(1, piece[:, None]).tolist()
    expected = torch.tensor([torch.tensor(level).mean() for level in losses]).mean()
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        torch.testing.assert_close(memory.extra_loss(model, ids, mask.bool()), expected)


@torch.no_grad()
def test_what_is_stored_is_the_compressed_text():
    model, memory = wrapped()
    rows = rows_of(2 * SIZE + 2, SIZE)
    ids, mask = pad(rows, "left")
    fields = ml.write(model, ids, attention_mask=mask)["past"]
    assert fields["tokens"].tolist() == [[6, 6, 2], [0, 0, 6]] and fields["length"].tolist() == [6, 2]
    whole = torch.ones(1, SIZE, dtype=torch.bool)
    embeds = model.get_input_embeddings()(rows[0][None, :SIZE])
    torch.testing.assert_close(fields["compressed"][:1, :2], memory.compress(embeds, whole))
    assert fields["compressed"][1, :4].abs().max() == 0


def test_reading_back_a_trained_memory():
    model, losses = trained()
    assert losses[-1] < losses[0] / 2
    rows = [row % 20 + 300 for row in rows_of(2 * SIZE + 2, 3, SIZE)]
    padded, real = pad(rows, "left")
    state = ml.write(model, padded, attention_mask=real)
    ids, mask = ml.read_back(model, state)
    assert ids.shape == mask.shape == (3, 14) and mask.sum(1).tolist() == [14, 3, 6]
    assert (ids[~mask] == 0).all() and mask[:, -1].all()
    full = torch.cat([rows[0][:12], rows[2]])  # training had no short segment
    said = torch.cat([ids[0][:12], ids[2][-6:]])
    assert (said == full).float().mean() > 0.6
    for index in range(3):
        alone, _ = ml.read_back(model, state.select([index]))
        assert torch.equal(alone[0], ids[index][mask[index]])
    other, _ = ml.read_back(model, state.select([2, 1, 0]), name="past")
    assert torch.equal(other, ids[[2, 1, 0]])


@torch.no_grad()
def test_open_segments_and_empty_states_give_nothing_back():
    model, memory = wrapped()
    ids, mask = ml.read_back(model, ml.MemoryState({"past": memory.new_state(2)}))
    assert ids.shape == mask.shape == (2, 0)
    state = ml.write(model, tokens(2, SIZE + 4), close=False)
    assert ml.read_back(model, state)[0].shape == (2, SIZE)


def test_what_cannot_be_read_back():
    model, _ = wrapped()
    state = ml.write(model, tokens(1, SIZE))
    with pytest.raises(ValueError, match=says("'notes'", "['past']")):
        ml.read_back(model, state, name="notes")
    with pytest.raises(ValueError, match=says("no memory 'past'", "['other']")):
        ml.read_back(model, ml.MemoryState({"other": state["past"]}))
    for field, tensor in [
        ("tokens", torch.ones(1, 2, dtype=torch.int64)),
        ("compressed", torch.zeros(1, 2, 8)),
    ]:
        fields = {**state["past"], field: tensor}
        with pytest.raises(ValueError, match=says("'compressed'", "another memory")):
            ml.read_back(model, ml.MemoryState({"past": fields}))
    plain = llama().model()
    with pytest.raises(ValueError, match=says("found none among ['stream']")):
        ml.read_back(plain, ml.write(plain, tokens(1, 5)))
    ml.attach(model, ml.ReversibleMemoryConfig(**FIELDS), name="other")
    with pytest.raises(ValueError, match=says("['other', 'past']", "give name=")):
        ml.read_back(model, state)


def test_a_segment_that_does_not_fit_the_model():
    with pytest.raises(ConfigError, match=says("segment_length", "96")):
        wrapped(n_tokens=16, ratios=[2, 4])
    with pytest.raises(ConfigError, match="heads: 5"):
        wrapped(heads=5)
