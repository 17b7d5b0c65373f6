"""The decoder called without its model, as trainers with a fused loss do: no call goes around the memory."""

import pytest
import torch
import torch.nn.functional as F
from matrix import SEGMENT, TEXT, llama, near, pad, same_state, says, tokens
from transformers.modeling_outputs import BaseModelOutputWithPast

import memlayers as ml

STATEFUL = [
    *("recurrent", "accumulate", "prefix", "neural_mag", "neural_mac", "neural_window"),
    *("lora", "cartridge", "associative", "reversible"),
]
BY_READING = [name for name in STATEFUL if name not in ("lora", "cartridge")]
INSIDE_LAYERS = ["neural_mag", "neural_mac", "lora", "cartridge", "associative"]
KINDS = [*STATEFUL, "product_key", "task_tokens"]

every_kind = pytest.mark.parametrize("name", KINDS)
stateful = pytest.mark.parametrize("name", STATEFUL)


def logits(model, output):
    return model.lm_head(output.last_hidden_state)


def written(model, seed=3):
    """A state with a text in it, for two rows."""
    return ml.write(model, tokens(2, TEXT, seed=seed))


@torch.no_grad()
@pytest.mark.parametrize("where", ["model", "base_model"])
@every_kind
def test_hidden_states_and_state_are_those_under_the_model(name, where):
    case = llama(name)
    model, ids = case.model(), case.tokens(2, TEXT)
    decoder = getattr(model, where)
    given = {} if name not in STATEFUL else {"memory_state": written(model), "close_memory": True}
    under, alone = model(ids, use_cache=True, **given), decoder(ids, use_cache=True, **given)
    assert isinstance(alone, BaseModelOutputWithPast)
    near(logits(model, alone), under.logits)
    if name != "task_tokens":  # whose ids the base does not know
        with ml.disabled(model):
            base = decoder(ids)
        assert (logits(model, base)[..., :300] - logits(model, alone)[..., :300]).abs().max() > 1e-2
    if name in STATEFUL:
        same_state(alone.memory_state, under.memory_state)
        assert alone.past_key_values.memory_state is alone.memory_state
    else:
        assert "memory_state" not in alone


@torch.no_grad()
@stateful
def test_arguments_by_position_and_by_name(name):
    model = llama(name).model()
    ids, mask = pad([tokens(1, TEXT)[0], tokens(1, 4, seed=2)[0]], "left")
    by_name = model.model(input_ids=ids, attention_mask=mask)
    near(model.model(ids, mask).last_hidden_state, by_name.last_hidden_state)
    near(logits(model, by_name), model(ids, attention_mask=mask).logits)
    embeds = model.get_input_embeddings()(ids)
    near(model.model(inputs_embeds=embeds, attention_mask=mask)[0], by_name[0])
    under = model(ids, attention_mask=mask)
    same_state(by_name.memory_state, under.memory_state)


@torch.no_grad()
@stateful
def test_a_text_in_two_calls_of_the_decoder(name):
    """By the cache and by the state, between calls of the decoder and of the model."""
    model, ids = llama(name).model(), tokens(2, TEXT)
    given = {"memory_state": written(model)}
    whole = model(ids, use_cache=True, **given)
    for one, other in [(model.model, model.model), (model.model, model), (model, model.model)]:
        first = one(ids[:, :7], use_cache=True, **given)
        assert first.past_key_values.get_seq_length() == 7
        second = other(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        got = second.logits if other is model else logits(model, second)
        near(got, whole.logits[:, 7:])
        same_state(second.memory_state, whole.memory_state)
        assert second.past_key_values is first.past_key_values


@torch.no_grad()
@pytest.mark.parametrize("name", ["recurrent", "accumulate", "associative", "neural_mac", "reversible"])
def test_close_memory_writes_the_open_segment(name):
    model, ids = llama(name).model(), tokens(2, SEGMENT + 2)
    open_, closed = model.model(ids), model.model(ids, close_memory=True)
    assert int(open_.memory_state["pending"]["length"].max()) == 2
    assert int(closed.memory_state["pending"]["length"].max()) == 0
    same_state(closed.memory_state, ml.write(model, ids))
    unwritten = model.model(ids, write_memory=False)
    assert int(unwritten.memory_state["pending"]["length"].min()) == SEGMENT + 2


@torch.no_grad()
@stateful
def test_what_is_wrong_is_refused_as_under_the_model(name):
    model, ids = llama(name).model(), tokens(2, 4)
    with pytest.raises(ValueError, match=says("rows", "2")):
        model.model(ids, memory_state=ml.write(model, tokens(1, 4)))
    with pytest.raises(ValueError, match="at least one token"):
        model.model(ids[:, :0])
    state = written(model)
    with pytest.raises(ValueError, match="each carry a state"):
        model.model(ids, memory_state=state, past_key_values=written(model, 4).to_cache())


@torch.no_grad()
@pytest.mark.parametrize("name", ["product_key", "task_tokens"])
def test_a_state_is_refused_where_no_memory_keeps_one(name):
    case = llama(name)
    model, state = case.model(), ml.write(llama().model(), tokens(2, 4))
    with pytest.raises(ValueError, match="memory_state"):
        model.model(case.tokens(2, 4), memory_state=state)
    with pytest.raises(ValueError, match="MemoryCache"):
        model.model(case.tokens(2, 4), past_key_values=state.to_cache())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in ml.memory_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("name", [*STATEFUL, "product_key"])
def test_training_through_the_decoder_reaches_memory(name):
    """As a fused loss does: the decoder, then the weight of the head alone."""
    model, ids = llama(name).model().train(), tokens(2, TEXT)
    hidden = model.model(ids).last_hidden_state[:, :-1]
    fused = F.cross_entropy((hidden @ model.lm_head.weight.T).flatten(0, 1), ids[:, 1:].flatten())
    got = gradients(model, fused)
    output = model(ids, labels=ids)
    near(fused, output.loss, 1e-5)
    expected = gradients(model, output.loss)
    assert got.keys() == expected.keys()
    assert any(g.abs().max() > 1e-6 for g in got.values())
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[parameter], gradient, atol=1e-5 * scale, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", BY_READING)
def test_what_was_written_has_a_gradient_in_the_next_call(name):
    model = llama(name).model().train()
    state = model.model(tokens(2, TEXT), close_memory=True).memory_state
    model.model(tokens(2, 4, seed=5), memory_state=state).last_hidden_state.pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in ml.memory_parameters(model))


def test_task_tokens_are_not_trained_without_their_head():
    case = llama("task_tokens")
    model, ids = case.model().train(), case.tokens(2, TEXT)
    for call in (model.model, model.base_model):
        with pytest.raises(ValueError, match=says("'tasks'", "head", "logits of its own", "model(...)")):
            call(ids)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        assert model.model(ids).last_hidden_state.shape[:2] == ids.shape
    with ml.disabled(model):
        assert model.model(tokens(2, 4)).last_hidden_state.shape[:2] == (2, 4)
    near(logits(model, model.eval().model(ids)), model(ids).logits)


def layer_arguments(model, n_tokens=4):
    hidden = model.get_input_embeddings()(tokens(2, n_tokens))
    where = torch.arange(n_tokens)[None]
    return hidden, {"position_embeddings": model.model.rotary_emb(hidden, where), "position_ids": where}


@torch.no_grad()
@pytest.mark.parametrize("name", INSIDE_LAYERS)
def test_a_layer_by_itself_is_refused(name):
    case = llama(name)
    model, base = case.model(), case.base()
    hidden, rest = layer_arguments(model)
    (memory,) = case.kind.configs
    with pytest.raises(ValueError, match=says(f"memory {memory!r}", "layer 1", "memlayers.disabled")):
        model.model.layers[1](hidden, **rest)
    with ml.disabled(model):
        got = model.model.layers[1](hidden, **rest)
    assert torch.equal(got, base.model.layers[1](hidden, **rest))
    model(tokens(2, 4))  # and a call of the whole works on


@torch.no_grad()
@pytest.mark.parametrize("name", INSIDE_LAYERS)
def test_a_part_of_a_layer_by_itself_is_refused(name):
    """An attention or a linear layer, as what calibrates or shows a model calls it."""
    case = llama(name)
    model, base = case.model(), case.base()
    hidden, rest = layer_arguments(model)
    (config,) = case.kind.configs.values()

    def call(model):
        layer = model.model.layers[1]
        if name == "lora":
            return layer.self_attn.q_proj(hidden)
        return layer.self_attn(hidden, attention_mask=None, **rest)[0]

    if name == "associative":  # which stands on whole layers alone
        assert torch.equal(call(model), call(base))
        return
    with pytest.raises(ValueError, match=says(f"kind {config.type}", "layer 1", "memlayers.disabled")):
        call(model)
    with ml.disabled(model):
        assert torch.equal(call(model), call(base))


@torch.no_grad()
def test_product_keys_need_no_call_of_the_model():
    """They keep no state, so that an MLP by itself reads them too."""
    model, base = llama("product_key").model(), llama("product_key").base()
    hidden, _ = layer_arguments(model)
    memory = ml.memories(model)["facts"]
    read = memory.layers["1"](hidden, memory.values)
    near(model.model.layers[1].mlp(hidden), base.model.layers[1].mlp(hidden) + read)


@torch.no_grad()
@every_kind
def test_the_decoder_after_detach_is_the_base(name):
    case = llama(name)
    model, ids = case.model(), tokens(2, TEXT)
    ml.detach(model)
    output = model.model(ids)
    assert torch.equal(output[0], case.base().model(ids)[0])
    assert type(output) is BaseModelOutputWithPast and "memory_state" not in output
