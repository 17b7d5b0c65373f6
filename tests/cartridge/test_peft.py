"""Cartridges that are learned once, beside PEFT's prompt tuning and prefix tuning with the same vectors."""

import pytest
import torch
from matrix import ARCHITECTURES, near, tokens
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import memlayers as ml

UNLIKE = [a for a in ARCHITECTURES if a.name in ("llama", "gpt2")]
N_TOKENS = 4
architectures = pytest.mark.parametrize("architecture", UNLIKE, ids=lambda a: a.name)
sides = pytest.mark.parametrize("side", ["none", "left"])


def both(architecture, start: str):
    """A model with a cartridge, and a model of PEFT with the same vectors."""
    torch.manual_seed(1)
    model, base = architecture.build().eval(), architecture.build().eval()
    if architecture.name == "gpt2":  # the tiny config has a field that GPT-2 does not know and PEFT believes
        base.config.num_key_value_heads = base.config.num_attention_heads
    memory = ml.attach(model, ml.CartridgeConfig(n_tokens=N_TOKENS, start=start, writer={"steps": 0}))
    config = {"prompt": PromptTuningConfig, "learned": PrefixTuningConfig}[start]
    peft = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=N_TOKENS)).eval()
    (table,) = (p for n, p in peft.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
        # PEFT lays keys and values of all layers and heads side by side in one row a place.
        flat = torch.stack([memory.keys, memory.values], 1) if start == "learned" else None
        table.copy_(memory.prompt if flat is None else flat.permute(2, 0, 1, 3, 4).reshape(table.shape))
    return model, memory, peft, table


def batch(side: str) -> dict:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    if side == "left":
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@sides
@architectures
def test_a_prompt_is_prompt_tuning(architecture, side):
    """Logits of the text and the gradient of the vectors to 2e-4: the prompt runs by itself here, before the text there."""
    model, memory, peft, table = both(architecture, "prompt")
    given = batch(side)
    got, expected = model(**given).logits, peft(**given).logits[:, N_TOKENS:]
    seen = given["attention_mask"].bool()
    near(got[seen], expected[seen])
    with ml.disabled(model):
        assert (model(**given).logits - got)[seen].abs().max() > 0.1
    for logits in (got, expected):
        logits[seen].logsumexp(-1).sum().backward()
    scale = float(table.grad.abs().max())
    torch.testing.assert_close(memory.prompt.grad, table.grad, atol=2e-4 * scale, rtol=2e-4)


@sides
@architectures
def test_learned_keys_and_values_are_prefix_tuning(architecture, side):
    """Logits of the text and the gradient of keys and values, to 2e-4."""
    model, memory, peft, table = both(architecture, "learned")
    given = batch(side)
    position_ids = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got, seen = model(**given, position_ids=position_ids).logits, given["attention_mask"].bool()
    # PEFT hands positions to neither; the base then counts those of the prefix, padding included, as ours does.
    columns = model(**given).logits
    expected = peft(**given).logits
    near(columns[seen], expected[seen])
    assert (side == "left") == (not torch.allclose(got[seen], columns[seen], atol=1e-3))
    for logits in (columns, expected):
        logits[seen].logsumexp(-1).sum().backward()
    grads = torch.stack([memory.keys.grad, memory.values.grad], 1).permute(2, 0, 1, 3, 4).reshape(table.shape)
    scale = float(table.grad.abs().max())
    torch.testing.assert_close(grads, table.grad, atol=2e-4 * scale, rtol=2e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@architectures
def test_prefixes_train_with_gradient_checkpointing(architecture, reentrant):
    """Where PEFT refuses prefix tuning; the gradients are those without."""
    base = architecture.build()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match="gradient checkpointing"):
        get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_TOKENS))
    for start in ("learned", "prompt"):
        model, memory, _, _ = both(architecture, start)
        found, given = [], batch("left")
        for checkpointed in (False, True):
            if checkpointed:
                model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            model(**given, labels=given["input_ids"]).loss.backward()
            found.append([p.grad.clone() for p in memory.parameters()])
        for one, other in zip(*found):
            assert one.abs().max() > 0
            torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=1e-4)


def test_a_prompt_is_the_same_for_all_texts_and_saved(tmp_path):
    """Writing leaves it; what is saved are its vectors, once."""
    model, memory, _, _ = both(UNLIKE[0], "prompt")
    fresh, written = memory.new_state(2), ml.write(model, tokens(2, 9))["cartridge"]
    assert all(torch.equal(fresh[field], written[field]) for field in fresh)
    base = tmp_path / "base"
    UNLIKE[0].build().save_pretrained(base)
    wrapped = AutoModelForCausalLM.from_pretrained(base)
    ml.attach(wrapped, memory.config)
    ml.memories(wrapped)["cartridge"].load_state_dict(memory.state_dict())
    ml.save(wrapped, tmp_path / "out")
    assert [tuple(p.shape) for p in memory.parameters()] == [(N_TOKENS, 32)]
    ids = tokens(2, 7)
    near(ml.load(tmp_path / "out")(ids).logits, model(ids).logits, 1e-6)
