"""Where product-key memory sits in a model: layers, placements, the shared table, several models."""

import pytest
import torch
from matrix import ARCHITECTURES, TEXT, architectures, llama, tokens
from safetensors.torch import load_file

import memlayers as ml
from memlayers.config import chosen_layers
from memlayers.core.model import sparse_gradients, value_tables

SMALL = {"n_keys": 8, "heads": 2, "top_k": 4, "key_dim": 8}


def base():
    return ARCHITECTURES[0].build().eval()


def with_memory(model=None, name="facts", **fields):
    model = model or base()
    memory = ml.attach(model, ml.ProductKeyMemoryConfig(**{**SMALL, **fields}), name)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_layers_by_default_are_evenly_spaced_and_centred():
    assert chosen_layers(None, 24) == [4, 12, 20]
    assert chosen_layers(None, 2) == [0, 1]
    assert chosen_layers([-1, 0], 5) == [4, 0]


def test_layers_that_do_not_fit():
    with pytest.raises(ml.ConfigError, match=r"layers\.1: layer 2 is out of range, the model has 2"):
        with_memory(layers=[0, 2])
    with pytest.raises(ml.ConfigError, match=r"layers: \[1, -1\] names a layer twice"):
        with_memory(layers=[1, -1])


def test_a_layer_without_an_mlp_is_named():
    model = base()
    model.model.layers[1].perceptron = model.model.layers[1].mlp
    del model.model.layers[1].mlp
    with pytest.raises(ml.ConfigError, match=r"layer 1 of LlamaForCausalLM has no MLP.*perceptron"):
        with_memory(model, layers=[1])
    assert ml.memories(model) == {}


def test_the_shared_table_is_stored_once(tmp_path):
    model = with_memory(layers=[0, 1])
    assert list(value_tables(model)) == ["memlayers.facts.values"]
    ml.save(model, tmp_path)
    tensors = load_file(tmp_path / "memory.safetensors")
    assert [name for name in tensors if name.endswith("values")] == ["memlayers.facts.values"]
    own = with_memory(layers=[0, 1], share_values=False)
    assert list(value_tables(own)) == [f"memlayers.facts.layers.{i}.values" for i in (0, 1)]


def test_both_layers_read_the_shared_table():
    model, ids, grads = with_memory(layers=[0, 1]), tokens(2, TEXT), []
    memory = ml.memories(model)["facts"]
    for silent in ("none", "0", "1"):
        kept = {n: m.value_proj.weight.clone() for n, m in memory.layers.items()}
        with torch.no_grad():
            if silent != "none":
                memory.layers[silent].value_proj.weight.zero_()
        grads.append(torch.autograd.grad(model(ids, labels=ids).loss, memory.values)[0])
        with torch.no_grad():
            for n, m in memory.layers.items():
                m.value_proj.weight.copy_(kept[n])
    assert all(g.any() for g in grads) and not torch.equal(grads[1], grads[2])


def test_replace_leaves_the_mlp_uncomputed_until_disabled():
    model, ids, calls = with_memory(layers=[1], placement="replace"), tokens(2, TEXT), []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(ids)
        assert calls == []
        with ml.disabled(model):
            assert torch.equal(model(ids).logits, base()(ids).logits)
        assert calls == [1]
    with pytest.raises(ml.ConfigError, match="already takes the place of the MLP of layer 1"):
        with_memory(model, "more", layers=[1], placement="replace")
    with_memory(model, "beside", layers=[1])  # one beside it is fine
    ml.detach(model, "facts")
    ml.detach(model, "beside")
    assert "forward" not in vars(model.model.layers[1].mlp)


def test_two_models_in_one_process_share_no_row():
    first, second, ids = with_memory(), with_memory(), tokens(2, TEXT)
    before = {name: p.clone() for name, p in ml.memory_parameters(second)}
    pointers = [{p.untyped_storage().data_ptr() for _, p in ml.memory_parameters(m)} for m in (first, second)]
    assert not pointers[0] & pointers[1]
    optimizer = torch.optim.SGD([p for _, p in ml.memory_parameters(first)], lr=1.0)
    first.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in ml.memory_parameters(second))
    assert all(p.grad is None for p in second.parameters())


def test_two_memories_with_names_add_up():
    model, ids = with_memory(name="facts", layers=[0]), tokens(2, TEXT)
    with torch.no_grad():
        one = model(ids).logits
        with_memory(model, "people", layers=[0], n_keys=9)
        both = model(ids).logits
        assert not torch.equal(both, one)
        with ml.disabled(model, "people"):
            assert torch.equal(model(ids).logits, one)


def test_it_composes_with_memory_tokens():
    model, ids = with_memory(), tokens(2, TEXT)
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=5), "stream")
    with torch.no_grad():
        state = ml.write(model, ids)
        assert set(state.fields) >= {"stream"} and "facts" not in state.fields
        answer = model(tokens(2, 3), memory_state=state).logits
        with ml.disabled(model, "facts"):
            assert not torch.equal(model(tokens(2, 3), memory_state=state).logits, answer)


def test_a_state_for_a_model_without_one_is_refused():
    model = base()
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=5))
    state = ml.write(model, tokens(1, 6))
    with pytest.raises(ValueError, match="memory_state= was given, but no enabled memory"):
        with_memory()(tokens(1, 3), memory_state=state)
    with pytest.raises(ValueError, match="nothing to write to"):
        ml.write(with_memory(), tokens(1, 6))


def test_sparse_gradients_are_switched_for_the_whole_model():
    model, ids = with_memory(layers=[0, 1]), tokens(2, TEXT)
    table = value_tables(model)["memlayers.facts.values"]
    gradients = []
    for on in (False, True):
        sparse_gradients(model, on)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert table.grad.is_sparse == on
        gradients.append(table.grad.to_dense())
    torch.testing.assert_close(
        *gradients, atol=1e-7, rtol=1e-5
    )  # two layers' gradients, added in another order


def test_nan_names_the_layer():
    model = with_memory(layers=[1])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN") as caught:
        model(tokens(1, 4))
    assert caught.value.__notes__ == ["in the product-key memory of layer 1"]


@architectures("product_key")
def test_a_step_on_the_table_moves_only_the_rows_read(case):
    model, ids = case.model(), tokens(1, 3)  # few reads of 64 slots, so that some are not read
    table = next(iter(value_tables(model).values()))
    before, read = table.detach().clone(), set()
    for layer in ml.memories(model)["facts"].layers.values():
        layer.observers.append(lambda indices, weights: read.update(indices.flatten().tolist()))
    model.train()(ids, labels=ids).loss.backward()
    torch.optim.SGD([table], lr=1.0).step()
    moved = set((table.detach() != before).any(1).nonzero().flatten().tolist())
    assert moved and moved <= read < set(range(len(table)))


def test_generation_reads_it():
    model, ids = llama("product_key").model(), tokens(1, 6)
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    with_facts = model.generate(ids, **options)
    with ml.disabled(model):
        without = model.generate(ids, **options)
    assert with_facts.sequences.shape == without.sequences.shape == (1, 12)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(with_facts.logits[:1], without.logits[:1]))
