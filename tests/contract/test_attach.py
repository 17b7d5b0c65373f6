"""Contract 1 to 3: the base stays what it was, additive kinds start at zero, only memory trains."""

import copy

import pytest
import torch
from matrix import LEARNS, SEGMENT, TEXT, cases, llama, near, pad, tokens, wrap

import memlayers as ml


def snapshot(model):
    """All that `attach` could leave behind: class, parameters by name, and what lies on each module."""
    return {
        "class": type(model),
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
        },
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "training": model.training,
    }


def assert_same(now, before):
    for part in before.keys() - {"tensors"}:
        assert now[part] == before[part], part
    assert list(now["tensors"]) == list(before["tensors"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(now["tensors"][name], tensor), name


@cases(scope="all")
def test_detach_returns_the_model_it_was(case):
    model = case.base()
    next(model.parameters()).requires_grad_(
        False
    )  # a mixture, so that restoring one value for all would show
    ids = tokens(2, TEXT)
    with torch.no_grad():
        logits = model(
            ids, output_hidden_states=True
        ).logits  # transformers leaves hooks of its own at the first
    before = snapshot(model)
    wrap(model, case.kind)
    with torch.no_grad():
        model(ids)
    assert ml.detach(model) is model
    assert_same(snapshot(model), before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert ml.memories(model) == {}


@cases()
def test_attach_keeps_class_keys_and_tensors(case):
    model = case.base()
    before = snapshot(model)
    wrap(model, case.kind)
    assert type(model) is before["class"]
    now = model.state_dict()
    added = now.keys() - before["tensors"].keys()
    assert bool(added) == case.kind.learns and all(name.startswith("memlayers.") for name in added)
    for name, tensor in before["tensors"].items():
        assert torch.equal(now[name], tensor), name
    assert set(ml.memories(model)) == set(case.kind.configs)
    assert {name for name, _ in ml.memory_parameters(model)} == added
    now, was = model.config.to_dict(), before["config"]
    assert now.pop("keys_to_ignore_at_inference") == ["past_key_values", "memory_state"]
    assert now == was


@cases(scope="all")
def test_disabled_is_the_base_bit_for_bit(case):
    base, model, ids = case.base(), case.model(), tokens(2, TEXT)
    with torch.no_grad():
        expected, wrapped = base(ids).logits, model(ids).logits
        with ml.disabled(model):
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, wrapped)
    if case.kind.n_new_tokens:
        assert wrapped.shape[-1] == expected.shape[-1] + case.kind.n_new_tokens
    elif case.kind.learns:
        assert (wrapped - expected).abs().max() > 1e-2


@cases(*LEARNS)
def test_a_deep_copy_is_a_model_of_its_own(case):
    model, ids = case.model(), case.tokens(2, TEXT)
    with torch.no_grad():
        before = model(ids).logits
        copied = copy.deepcopy(model)
        assert torch.equal(copied(ids).logits, before)
        for _, parameter in ml.memory_parameters(copied):
            parameter.add_(0.1)
        assert not torch.equal(copied(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
        ml.detach(copied)
        known = tokens(2, TEXT)
        assert torch.equal(copied(known).logits, case.base()(known).logits)
        assert torch.equal(model(ids).logits, before)


def test_one_of_two_memories_can_go():
    case = llama("two_memories")
    model, ids = case.model(), tokens(2, TEXT)
    with torch.no_grad():
        with ml.disabled(model, "log"):
            alone = model(ids).logits
        ml.detach(model, "log")
        assert set(ml.memories(model)) == {"notes"}
        assert torch.equal(model(ids).logits, alone)
        with pytest.raises(KeyError, match="no memory named 'log' in this model; it has \\['notes'\\]"):
            ml.detach(model, "log")
        ml.detach(model, "notes")
        assert torch.equal(model(ids).logits, case.base()(ids).logits)


@cases(lambda kind: kind.additive and kind.learns, "moves the logits from the start, or has no parameters")
def test_additive_kinds_start_at_zero_with_a_gradient(case):
    base, ids = case.base(), tokens(2, TEXT)
    model = wrap(case.base(), case.kind, shake=False)
    output, expected = model(ids, labels=ids), base(ids).logits
    assert torch.equal(output.logits[..., : expected.shape[-1]], expected)
    output.loss.backward()
    assert all(
        any(p.grad is not None and p.grad.abs().max() > 0 for p in memory.parameters())
        for memory in ml.memories(model).values()
    )


READS_WHAT_IS_WRITTEN = (
    lambda kind: {config.type for config in kind.configs.values()} <= {"tokens", "reversible"},
    "has something to read before anything is written",
)


@torch.no_grad()
@cases(*READS_WHAT_IS_WRITTEN)
def test_nothing_written_is_the_base_bit_for_bit(case):
    """A text within its first segment, in a batch too, and what is generated from it; trained or not. The base is the same
    model with its memory disabled: what a matrix product rounds to depends on where the weights lie in memory."""
    model, ids, longest = case.model(), tokens(2, SEGMENT - 2), tokens(2, 2 * SEGMENT)
    batch, mask = pad([tokens(1, SEGMENT - 1, seed=1)[0], ids[0]], "left")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def outputs():
        short = [
            model(ids).logits,
            model(ids, use_cache=False).logits,
            *model.generate(ids, **options).logits,
        ]
        return short, model(batch, attention_mask=mask).logits[1, -len(ids[0]) :], model(longest).logits

    got, padded, long = outputs()
    with ml.disabled(model):
        expected, alone, base_long = [*outputs()[:1], model(ids[:1]).logits[0], model(longest).logits]
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    near(padded, alone)
    assert not torch.equal(long, base_long)


@cases(*LEARNS)
def test_the_base_is_frozen_and_memory_gets_gradients(case):
    model, ids = case.model(), case.tokens(2, 3 * SEGMENT)
    memory = dict(ml.memory_parameters(model))
    assert all(p.requires_grad for p in memory.values())
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in memory:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} got no gradient"
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


@cases()
def test_freeze_base_false_trains_both(case):
    model, ids = case.model(freeze_base=False), tokens(2, 3 * SEGMENT)
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        unused = case.kind.replaces and ".mlp." in name
        assert parameter.grad is not None or unused, name


@cases(lambda kind: kind.segmented, "does not read in segments", scope="none")
def test_window_is_the_segment(case):
    base, model = case.base(), case.model()
    assert ml.window(model) == SEGMENT
    assert ml.window(base) == base.config.max_position_embeddings
    with ml.disabled(model):
        assert ml.window(model) == ml.window(base)


@cases(lambda kind: kind.segmented, "does not read in segments")
def test_hidden_states_have_the_shape_of_the_text(case):
    model, ids = case.model(), tokens(2, TEXT)
    with torch.no_grad():
        plain, output = model(ids), model(ids, output_hidden_states=True)
    near(output.logits, plain.logits)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert {tuple(h.shape) for h in output.hidden_states} == {(2, TEXT, model.config.hidden_size)}
    near(model.get_output_embeddings()(output.hidden_states[-1]), plain.logits)
    assert plain.hidden_states is None
