"""PEFT over, under and beside memory: nothing of a memory is adapted, hooks follow what PEFT does, prompts are text."""

import copy
import pickle

import pytest
import torch
from matrix import KINDS, TEXT, llama, near, says, tokens, wrap
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft_cases import (
    ADAPTERS,
    LORA,
    SOME,
    adapted,
    both,
    kinds,
    logits,
    orders,
    some_kinds,
    unadapted,
    untied,
)
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

import memlayers as ml
from memlayers.core.linear import Linear


def test_a_linear_layer_of_a_memory_is_one_of_torch_but_for_its_class():
    for shape in ((3, 5, True), (7, 2, False)):
        torch.manual_seed(0)
        theirs, after = nn.Linear(*shape), torch.rand(1)
        torch.manual_seed(0)
        ours = Linear(*shape)
        assert torch.equal(torch.rand(1), after)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        x = torch.randn(2, shape[0])
        assert torch.equal(ours(x), theirs(x)) and not isinstance(ours, nn.Linear)


@kinds
def test_no_memory_has_linear_layers_for_others(kind):
    model = llama(kind.name).model()
    inside = [n for n, m in model.named_modules() if n.startswith("memlayers.") and isinstance(m, nn.Linear)]
    assert inside == []


@kinds
def test_targets_of_the_base_are_not_found_in_a_memory(kind):
    """By their ends, which PEFT compares: of every module that the memory has and the base has not."""
    model = wrap(untied(), kind)
    names = [name for name, _ in ml.memory_parameters(model)]
    ends = {str(n).rsplit(".", 1)[-1] for n, _ in model.named_modules() if str(n).startswith("memlayers")}
    base = {n.rsplit(".", 1)[-1] for n, _ in untied().named_modules()}
    ends = sorted(end for end in ends - base if not end.isdigit() and not "lora_dropout".endswith(end))
    config = LoraConfig(
        target_modules=["q_proj", *ends],
        modules_to_save=["input_layernorm", *ends],
        trainable_token_indices=[300],
    )
    unadapted(get_peft_model(model, config), names)


def test_a_suffix_that_base_and_memory_share():
    """OPT's attention and the neural memory both have an out_proj."""
    config = OPTConfig(
        vocab_size=512, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, do_layer_norm_before=True,
        word_embed_proj_dim=32, max_position_embeddings=96,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ml.attach(model, ml.NeuralMemoryConfig(layers=[0], heads=2, chunk_size=4), name="m")
    names = [name for name, _ in ml.memory_parameters(model)]
    assert any("out_proj" in name for name in names)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["out_proj"], r=2))
    unadapted(wrapped, names)
    assert any("out_proj.lora_A" in name for name, _ in wrapped.named_parameters())


def test_a_pattern_that_matches_a_memory_says_what_to_do():
    def matched(**more):
        model = wrap(untied(), next(k for k in KINDS if k.name == "neural_mag"))
        return get_peft_model(model, LoraConfig(target_modules=r".*\.(q_proj|out_proj)", **more))

    with pytest.raises(ValueError, match=says("of a memory", "exclude_modules=")):
        matched()
    unadapted(model := matched(exclude_modules=r".*memlayers\..*"), list(dict(ml.memory_parameters(model))))


@orders
@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a not in ("rslora", "all_linear", "loha")])
@some_kinds
def test_merging_keeps_what_is_computed(kind, adapter, first):
    """Whatever it does to a layer's output; and detaching afterwards leaves the base with the adapter in it."""
    model, ids = both(kind, adapter, first), tokens(2, TEXT)
    state = ml.write(model, ids) if kind.stateful else None
    before = logits(model, kind, ids, state)
    with ml.disabled(model), torch.no_grad():
        base = model(input_ids=ids).logits
        assert base.shape != before.shape or (base - before).abs().max() > 1e-2, "memory does nothing"
    merged = model.merge_and_unload()
    near(logits(merged, kind, ids, state), before, 5e-4)
    with torch.no_grad():
        near(ml.detach(merged)(ids).logits, base, 5e-4)


@orders
@some_kinds
def test_unloading_leaves_memory_alone(kind, first):
    model, ids = both(kind, "dora", first), tokens(2, TEXT)
    plain = logits(wrap(untied(), kind), kind, ids)
    assert (logits(model, kind, ids) - plain).abs().max() > 1e-2
    near(logits(model.unload(), kind, ids), plain, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PromptTuningConfig, PromptEncoderConfig])
@some_kinds
def test_a_prompt_before_the_text_is_read_as_text(kind, prompts):
    model, ids = wrap(llama().base(), kind), tokens(2, TEXT)
    config = prompts(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).eval()
    mask = torch.ones_like(ids)
    got = tuned(input_ids=ids, attention_mask=mask).logits
    embeds = torch.cat([tuned.get_prompt(2), model.get_input_embeddings()(ids)], dim=1)
    near(got, model(inputs_embeds=embeds).logits, 1e-5)
    given = dict(attention_mask=mask, max_new_tokens=3, do_sample=False)
    answer = tuned.generate(input_ids=ids, **given)
    assert torch.equal(answer[:, TEXT], got[:, -1].argmax(-1))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **given), model.generate(ids, **given)[:, TEXT:])


@torch.no_grad()
@some_kinds
def test_a_prefix_is_refused_where_memory_reads(kind):
    tuned = get_peft_model(
        wrap(llama().base(), kind), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    if kind.stateful:
        with pytest.raises(ValueError, match="read without memory"):
            tuned(input_ids=tokens(2, TEXT))
    else:
        assert tuned(input_ids=tokens(2, TEXT)).logits.shape[:2] == (2, TEXT)


def test_a_copy_around_a_memory_is_refused():
    config = LoraConfig(target_modules=["down_proj"], modules_to_save=["self_attn"], **LORA)
    kind = next(k for k in SOME if k.name == "lora")
    model = get_peft_model(wrap(untied(), kind), config)
    with pytest.raises(ValueError, match=says("self_attn", "modules_to_save", "leave")):
        model(input_ids=tokens(2, TEXT))


@some_kinds
def test_detaching_right_after_peft_copied_a_part(kind):
    model, ids = both(kind, "copy_of_head", "memory_first"), tokens(2, TEXT)
    ml.detach(model)
    with torch.no_grad():
        near(
            model(input_ids=ids).logits,
            adapted(untied(), "copy_of_head")(ids).logits,
        )
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_with_adapters_is_copied_and_pickled():
    for kind in SOME:
        model, ids = both(kind, "dora", "memory_first"), tokens(2, TEXT)
        expected = logits(model, kind, ids)
        near(logits(copy.deepcopy(model), kind, ids), expected, 1e-6)
        near(logits(pickle.loads(pickle.dumps(model)), kind, ids), expected, 1e-6)
