"""What a call gives out: of the base's class, taken apart and put together by other libraries, complete."""

import copy
import pickle

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, convert_to_fp32
from matrix import TEXT, llama, near, pad, same_state, says, tokens
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import memlayers as ml

STATEFUL = [
    *("recurrent", "accumulate", "prefix", "neural_mag", "neural_mac", "neural_window"),
    *("lora", "cartridge", "associative", "reversible"),
]
ALL = [*STATEFUL, "product_key", "task_tokens"]
IN_BLOCKS = [name for name in STATEFUL if name not in ("neural_mag", "lora", "cartridge")]
IN_ONE = [name for name in ALL if name not in IN_BLOCKS]
stateful = pytest.mark.parametrize("name", STATEFUL)
every_kind = pytest.mark.parametrize("name", ALL)


def given(model, name, rows=2):
    """What a call is given: a state with a text in it, where the kind keeps one."""
    return {"memory_state": ml.write(model, tokens(rows, TEXT, seed=3))} if name in STATEFUL else {}


@torch.no_grad()
def outputs(name):
    """What the model and its decoder give out."""
    case = llama(name)
    model, ids = case.model(), case.tokens(2, TEXT)
    state = given(model, name)
    return model(ids, labels=ids, use_cache=True, **state), model.model(ids, use_cache=True, **state)


def same(got, expected, name):
    assert type(got) is type(expected) and list(got.keys()) == list(expected.keys())
    for key in ("loss", "logits", "last_hidden_state"):
        if key in expected:
            assert torch.equal(got[key], expected[key]), key
    if name in STATEFUL:
        assert isinstance(got.memory_state, ml.MemoryState) and got["memory_state"] is got.memory_state
        same_state(got.memory_state, expected.memory_state, 0)


@every_kind
def test_it_is_of_the_bases_class(name):
    for output, base in zip(outputs(name), (CausalLMOutputWithPast, BaseModelOutputWithPast)):
        assert isinstance(output, base)
        assert ("memory_state" in output) == (name in STATEFUL)
        first = "loss" if base is CausalLMOutputWithPast else "last_hidden_state"
        assert output[0] is output[first] and output.to_tuple()[0] is output[0]
        assert len(output.to_tuple()) == len(output.keys())
        if name in STATEFUL:
            assert output.to_tuple()[-1] is output.memory_state


@every_kind
def test_it_is_taken_apart_and_put_together(name):
    for output in outputs(name):
        same(type(output)(**output), output, name)
        leaves, spec = pytree.tree_flatten(output)
        same(pytree.tree_unflatten(leaves, spec), output, name)
        if name in STATEFUL:
            found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            held = [t for part in output.memory_state.fields.values() for t in part.values()]
            assert all(any(t is leaf for leaf in found) for t in held)  # DDP looks for gradients in them
        twice = pytree.tree_map(lambda x: x * 2 if isinstance(x, torch.Tensor) else x, output)
        key = "logits" if "logits" in output else "last_hidden_state"
        assert torch.equal(twice[key], output[key] * 2)


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_it_is_copied(name, copied):
    for output in outputs(name):
        other = copied(output)
        same(other, output, name)
        if name not in STATEFUL:
            continue
        for one, its in (
            (output.memory_state, other.memory_state),
            (output.past_key_values, other.past_key_values),
        ):
            assert one is not its
        same_state(copied(output.memory_state), output.memory_state, 0)
        assert other.memory_state.kinds == output.memory_state.kinds
        assert other.past_key_values.memory_state is other.memory_state
        before = output.memory_state.clone()
        for part in other.memory_state.fields.values():
            for tensor in part.values():
                tensor.zero_()
        same_state(output.memory_state, before, 0)


@torch.no_grad()
@every_kind
def test_a_tuple_is_the_output_without_its_names(name):
    case = llama(name)
    model, ids = case.model(), case.tokens(2, TEXT)
    state = given(model, name)
    for call, labels in ((model, {"labels": ids}), (model, {}), (model.model, {})):
        whole = call(ids, use_cache=True, **labels, **state)
        parts = call(ids, use_cache=True, return_dict=False, **labels, **state)
        assert type(parts) is tuple and len(parts) == len(whole.keys())
        assert torch.equal(parts[0], whole[0])
        if name in STATEFUL:
            same_state(parts[-1], whole.memory_state, 0)


@every_kind
def test_accelerate_makes_it_float32(name):
    for output in outputs(name):
        half = pytree.tree_map(
            lambda x: x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, output
        )
        for got in (convert_to_fp32(half), convert_outputs_to_fp32(lambda kept=half: kept)()):
            assert type(got) is type(output)
            key = "logits" if "logits" in output else "last_hidden_state"
            assert got[key].dtype == torch.float32
            if name in STATEFUL:
                assert isinstance(got.memory_state, ml.MemoryState)
                assert got.memory_state.fields.keys() == output.memory_state.fields.keys()


@torch.no_grad()
@every_kind
def test_functional_call_takes_other_weights(name):
    case = llama(name)
    model, ids = case.model(), case.tokens(2, TEXT)
    state, weights = given(model, name), dict(model.named_parameters())
    expected = model(ids, **state)
    near(torch.func.functional_call(model, weights, (ids,), state).logits, expected.logits, 0)
    moved = {n: p + 0.5 if n.startswith("memlayers.") else p for n, p in weights.items()}
    if name in STATEFUL:
        state = {"close_memory": True, "memory_state": None}
    got = torch.func.functional_call(model, moved, (ids,), state)
    for parameter, (_, weight) in zip(moved, model.named_parameters()):
        weight.copy_(moved[parameter])
    again = model(ids, **state)
    near(got.logits, again.logits)
    assert (again.logits - expected.logits).abs().max() > 1e-3
    if name in STATEFUL:
        same_state(got.memory_state, again.memory_state)


@torch.no_grad()
@pytest.mark.parametrize("name", IN_ONE)
def test_maps_of_attention_are_those_that_were_used(name):
    case = llama(name)
    model, ids = case.model(), case.tokens(2, TEXT)
    model.set_attn_implementation("eager")
    state, used = given(model, name), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: used.append(output[1]))
    plain = model(ids, **state).logits
    used.clear()
    output = model(ids, output_attentions=True, **state)
    near(output.logits, plain)
    assert len(output.attentions) == len(used) == 2
    places = 3 if name == "cartridge" else 0
    for attention, expected in zip(output.attentions, used):
        assert torch.equal(attention, expected) and attention.shape == (2, 4, TEXT, TEXT + places)
        near(attention.sum(-1), torch.ones(2, 4, TEXT), 1e-5)
        assert not attention[..., places:].triu(1).any()
    if name == "cartridge":
        assert (output.attentions[0][..., :places] > 0).all()
    near(model.model(ids, output_attentions=True, **state).attentions[1], output.attentions[1])
    if name != "task_tokens":  # whose ids the base does not know
        with ml.disabled(model):
            base = model(ids, output_attentions=True).attentions[1]
        assert (base - output.attentions[1][..., places:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_maps_of_attention_are_refused_where_there_are_several(name):
    model, ids = llama(name).model(), tokens(2, TEXT)
    model.set_attn_implementation("eager")
    state = given(model, name)
    for call in (model, model.model):
        with pytest.raises(ValueError, match=says("output_attentions", "in blocks", "memlayers.disabled")):
            call(ids, output_attentions=True, **state)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
    with ml.disabled(model):
        assert len(model(ids, output_attentions=True).attentions) == 2
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, **state)
    assert model(ids, output_attentions=False, **state).get("attentions") is None


@torch.no_grad()
@every_kind
def test_hidden_states_are_chosen_by_index(name):
    case = llama(name)
    model = case.model()
    rows = [case.tokens(1, TEXT)[0], tokens(1, 4, seed=4)[0]]
    ids, mask = pad(rows, "left")
    state = given(model, name)
    whole = model(ids, attention_mask=mask, output_hidden_states=True, **state).hidden_states
    assert len(whole) == 3 and all(h.shape == (2, TEXT, 32) for h in whole)
    real = mask.bool()
    near(model.lm_head(whole[-1])[real], model(ids, attention_mask=mask, **state).logits[real])
    for call in (model, model.model):
        for chosen in ([0, 2], [1], [-1]):
            got = call(ids, attention_mask=mask, output_hidden_states=chosen, **state).hidden_states
            for index, hidden in enumerate(got):
                if index in [c % 3 for c in chosen]:
                    near(hidden[real], whole[index][real])
                else:
                    assert hidden is None
    if name in STATEFUL:
        by_itself = {"memory_state": state["memory_state"].select([1])}
        alone = model(rows[1][None], output_hidden_states=[1], **by_itself).hidden_states[1]
        if case.kind.segmented:  # the others are not told positions here, which count padding
            near(whole[1][1:, -4:], alone)
