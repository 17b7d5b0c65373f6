"""Cartridges: keys and values before a text, beside a plain cache that holds them, and beside reading the text."""

import pytest
import torch
from matrix import ARCHITECTURES, near, pad, says, tokens
from transformers import DynamicCache

import memlayers as ml

LLAMA = ARCHITECTURES[0]
WHOLE = [a for a in ARCHITECTURES if a.name in ("llama", "qwen3", "gpt2", "gpt_neox", "phi3")]
"""Architectures that attend to all of a text."""


def wrapped(architecture=LLAMA, attention="sdpa", dtype=torch.float32, name="notes", **fields):
    """A model with a cartridge that is not refined."""
    model = architecture.build().eval().to(dtype)
    model.set_attn_implementation(attention)
    writer = {"steps": 0, "segment_length": 6, **fields.pop("writer", {})}
    torch.manual_seed(1)
    ml.attach(model, ml.CartridgeConfig(**{"n_tokens": 16, "writer": writer, **fields}), name=name)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", WHOLE, ids=lambda a: a.name)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cartridge_of_the_whole_text_is_the_text(architecture, attention, side):
    model, base = wrapped(architecture, attention), architecture.build().eval()
    texts, question = [tokens(1, n, seed=n)[0] for n in (9, 2, 14)], tokens(3, 5, seed=3)
    ids, mask = pad(texts, side)
    state = ml.write(model, ids, attention_mask=mask)
    assert state["notes"]["length"].tolist() == [9, 2, 14]
    for row, text in enumerate(texts):
        read = base(torch.cat([text, question[row]])[None]).logits[:, len(text) :]
        near(model(question, memory_state=state).logits[row : row + 1], read)


def test_learned_keys_and_values_are_those_of_a_cache():
    """Prefix tuning: the same keys and values in a cache that the base is given."""
    model, base, ids = wrapped(start="learned"), LLAMA.build().eval(), tokens(2, 7)
    memory = ml.memories(model)["notes"]
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(memory.keys, memory.values)):
        cache.update(*(x.transpose(0, 1).expand(2, -1, -1, -1) for x in (keys, values)), layer)
    near(model(ids).logits, base(ids, past_key_values=cache).logits)


def test_nothing_written_is_the_base():
    model, ids = wrapped(), tokens(2, 7)
    assert torch.equal(model(ids).logits, LLAMA.build().eval()(ids).logits)


def test_a_part_of_a_text_is_refined():
    """Steps on the whole text make 4 places say more of it; a row is written as if alone."""
    losses, ids = [], tokens(3, 17)
    for steps in (0, 12):
        writer = {"steps": steps, "learning_rate": 0.1}
        model = wrapped(n_tokens=4, dtype=torch.float64, writer=writer)
        state = ml.write(model, ids)
        losses.append(model(ids, memory_state=state, labels=ids).loss.item())
        alone = ml.write(model, ids[1:2])
        for field, tensor in alone["notes"].items():
            torch.testing.assert_close(state["notes"][field][1:2], tensor, atol=1e-5, rtol=1e-5)  # float32
    assert losses[1] < 0.9 * losses[0]


def test_a_second_text_refines_what_the_first_left():
    model = wrapped(n_tokens=4, writer={"steps": 1, "learning_rate": 0.01})
    first = ml.write(model, tokens(2, 9))
    second = ml.write(model, tokens(2, 9, seed=5), first)
    assert second["notes"]["length"].tolist() == [4, 4]
    moved = (second["notes"]["layers.1.keys"] - first["notes"]["layers.1.keys"]).abs()
    assert 0 < moved.max() <= 0.011  # one step of AdamW goes as far as its rate


def test_two_cartridges_stand_side_by_side():
    """Both are seen; one without places changes nothing."""
    model, ids = wrapped(), tokens(2, 5)
    state = ml.write(model, tokens(2, 9))
    alone = model(ids, memory_state=state).logits
    ml.attach(model, ml.CartridgeConfig(n_tokens=4, writer={"steps": 0}), name="more")
    both = ml.write(model, tokens(2, 9, seed=5))
    empty = {**both.fields, "more": ml.memories(model)["more"].new_state(2)}
    empty["notes"] = state["notes"]
    near(model(ids, memory_state=ml.MemoryState(empty)).logits, alone)
    seen = model(ids, memory_state=ml.MemoryState({**both.fields, "notes": state["notes"]})).logits
    assert (seen - alone).abs().max() > 0.01


def test_bad_input_is_named():
    with pytest.raises(ml.ConfigError, match=says("n_tokens:", "greater than or equal to 1")):
        ml.CartridgeConfig(n_tokens=0)
    model = wrapped(ARCHITECTURES[3], n_tokens=16)  # GPT-2 has a table of 96 positions
    state = ml.write(model, tokens(1, 20))
    with pytest.raises(ValueError, match=says("reaches position 96", "table of 96")):
        model(tokens(1, 81), memory_state=state)
    other = wrapped(ARCHITECTURES[3], name="notes", n_tokens=2)
    fields = dict(state["notes"])
    fields["layers.1.keys"] = fields["layers.1.keys"][:, :, :1]
    with pytest.raises(ValueError, match=says("'notes'", "layers.1.keys", "another memory")):
        other(tokens(1, 4), memory_state=ml.MemoryState({"notes": fields}))


def test_a_text_is_read_in_training_with_checkpointing():
    """Which would keep no keys and values."""
    model, ids = wrapped(n_tokens=4), tokens(2, 9)
    expected = ml.write(model, ids)["notes"]
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    got = ml.write(model, ids)["notes"]
    assert model.training and set(got) == set(expected)
    assert all(torch.equal(got[field], expected[field]) for field in got)
