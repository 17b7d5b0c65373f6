"""Adapters of PEFT and memory in one checkpoint: what is saved comes back, or is refused with a reason."""

import copy
import json
import warnings

import pytest
import torch
from matrix import TEXT, llama, near, says, tokens, wrap
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft_cases import (
    ADAPTERS,
    LORA,
    SOME,
    adapters,
    both,
    logits,
    orders,
    shaken,
    some_kinds,
    unadapted,
    untied,
)
from safetensors.torch import load_file, save_file
from torch import nn

import memlayers as ml


@orders
@adapters
@some_kinds
def test_saved_and_loaded(kind, adapter, first, tmp_path):
    model, ids = both(kind, adapter, first), tokens(2, TEXT)
    ml.save(model, tmp_path)
    loaded = ml.load(tmp_path, base=untied()).eval()
    expected = logits(model, kind, ids)
    near(logits(loaded, kind, ids), expected, 1e-5)
    with ml.disabled(model), ml.disabled(loaded), torch.no_grad():
        near(loaded(ids).logits, model(input_ids=ids).logits, 1e-5)
    names = [name for name, _ in ml.memory_parameters(wrap(untied(), kind))]
    for each in (model, loaded):
        unadapted(each, names)
    assert not [name for name in load_file(tmp_path / "memory.safetensors") if "base_layer" in name]
    assert json.loads((tmp_path / "memory_config.json").read_text())["active_adapters"] == ["default"]


@pytest.mark.parametrize("active", [["first"], ["second"], ["first", "second"]], ids="+".join)
@some_kinds
def test_several_adapters_and_which_is_active(kind, active, tmp_path):
    model = get_peft_model(wrap(untied(), kind), ADAPTERS["lora"](), adapter_name="first")
    model.add_adapter(
        "second", LoraConfig(target_modules=["o_proj", "q_proj"], modules_to_save=["lm_head"], **LORA)
    )
    shaken(model).base_model.set_adapter(active)
    ids = tokens(2, TEXT)
    ml.save(model, tmp_path)
    loaded = ml.load(tmp_path, base=untied()).eval()
    near(logits(loaded, kind, ids), logits(model, kind, ids), 1e-5)
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["first", "second"]
    assert list(loaded.peft_config) == ["first", "second"]
    again = tmp_path / "again"
    ml.save(loaded, again)
    assert json.loads((again / "memory_config.json").read_text())["active_adapters"] == active


def test_disabled_adapters_stay_so(tmp_path):
    model, ids = both(SOME[0], "lora", "memory_first"), tokens(2, TEXT)
    model.base_model.disable_adapter_layers()
    ml.save(model, tmp_path)
    near(logits(ml.load(tmp_path, base=untied()), SOME[0], ids), logits(model, SOME[0], ids), 1e-5)


def test_peft_models_inside_each_other(tmp_path):
    for kind in SOME:
        inner = get_peft_model(wrap(untied(), kind), ADAPTERS["lora"](), adapter_name="inner")
        model, ids = shaken(get_peft_model(inner, ADAPTERS["loha"](), adapter_name="outer")), tokens(2, TEXT)
        expected = logits(model, kind, ids)
        ml.save(model, tmp_path / kind.name)
        near(logits(ml.load(tmp_path / kind.name, base=untied()), kind, ids), expected, 1e-5)


@pytest.mark.parametrize("adapter", ["lora", "copy_of_head", "tokens"])
def test_the_base_is_saved_without_adapters(adapter, tmp_path):
    kind, ids = SOME[0], tokens(2, TEXT)
    model = both(kind, adapter, "memory_first")
    ml.save(model, tmp_path, save_base=True)
    near(logits(ml.load(tmp_path), kind, ids), logits(model, kind, ids), 1e-5)
    assert load_file(tmp_path / "base/model.safetensors").keys() <= untied().state_dict().keys()
    model.merge_adapter()
    with pytest.raises(ValueError, match=says("save_base", "merged", "unmerge_adapter")):
        ml.save(model, tmp_path / "merged", save_base=True)


def test_the_base_is_saved_where_transformers_put_the_adapter_in(tmp_path):
    model, ids = wrap(untied(), SOME[0]), tokens(2, TEXT)
    model.add_adapter(ADAPTERS["lora"](), "mine")
    ml.save(model, tmp_path, save_base=True)
    near(logits(ml.load(tmp_path), SOME[0], ids), logits(model, SOME[0], ids), 1e-5)


@pytest.mark.parametrize("prompts", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_prompts_are_not_saved_with_a_memory(prompts, tmp_path):
    model = get_peft_model(llama().model(), prompts(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=says("default", "save_pretrained", "get_base_model")):
        ml.save(nn.DataParallel(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "prompts")
    ml.save(model.get_base_model(), tmp_path / "out")
    assert list(ml.memories(ml.load(tmp_path / "out", base=llama().base()))) == ["stream"]


def test_adapters_that_share_what_they_are_made_of_are_refused(tmp_path):
    model = get_peft_model(llama().model(), VeraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=says("VERA", "merge_and_unload", "save_base")):
        ml.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_from_before_there_were_several(tmp_path):
    """One adapter in the folder lora, and nothing in the config that says so."""
    model, ids = both(SOME[0], "lora", "peft_first"), tokens(2, TEXT)
    ml.save(model, tmp_path)
    (tmp_path / "adapters/default").rename(tmp_path / "lora")
    config = json.loads((tmp_path / "memory_config.json").read_text())
    del config["adapters"], config["active_adapters"]
    (tmp_path / "memory_config.json").write_text(json.dumps({**config, "format": 1}))
    near(
        logits(ml.load(tmp_path, base=untied(), verify=False), SOME[0], ids),
        logits(model, SOME[0], ids),
        1e-5,
    )


def test_files_of_adapters_that_are_wrong(tmp_path):
    model = both(SOME[0], "lora", "peft_first")
    ml.save(model, tmp_path)
    weights, config = tmp_path / "adapters/default/adapter_model.safetensors", tmp_path / "memory_config.json"
    assert load_file(weights).keys() == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    whole, written = load_file(weights), config.read_text()
    name = next(iter(whole))
    base = untied()
    before = {n: p.requires_grad for n, p in base.named_parameters()}

    def refused(*said, error=ValueError):
        with pytest.raises(error, match=says(*said)):
            ml.load(tmp_path, base=base, verify=False)
        with pytest.raises((ValueError, OSError), match=says(str(tmp_path))):
            ml.load(tmp_path, base=base)
        assert {n: p.requires_grad for n, p in base.named_parameters()} == before

    save_file({n: t for n, t in whole.items() if n != name}, weights)
    refused(str(weights), name, "is missing")
    save_file({**whole, "more": torch.zeros(1)}, weights)
    refused(str(weights), "'more'", "does not belong")
    save_file({**whole, name: torch.zeros(1, 1)}, weights)
    refused(str(weights), name, "(1, 1)")
    weights.write_bytes(b"cut")
    refused(str(weights), "cut short")
    weights.unlink()
    refused(str(weights), "is missing", error=FileNotFoundError)
    config.write_text(json.dumps({**json.loads(written), "active_adapters": ["other"]}))
    refused(str(config), "active_adapters", error=ml.ConfigError)
    for name in ("..", "a.b", ""):
        config.write_text(json.dumps({**json.loads(written), "adapters": [name], "active_adapters": [name]}))
        refused(str(config), "adapters", error=ml.ConfigError)
    ml.save(model, tmp_path)
    place = weights.parent / "adapter_config.json"
    for text in (
        "{",
        "[]",
        "null",
        '{"peft_type": ["LORA"]}',
        '{"peft_type": "LORA", "r": "x"}',
        "[" * 200_000,
    ):
        place.write_text(text)
        refused(str(place))
    ml.save(model, tmp_path)
    with pytest.raises(ValueError, match=says("default", "unload")):
        ml.load(tmp_path, base=get_peft_model(untied(), ADAPTERS["lora"]()))


def test_an_adapter_is_loaded_by_peft_alone(tmp_path):
    """What stands in adapters/NAME is a PEFT adapter, all of whose tensors PEFT finds."""
    base = llama().base()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=4), name="stream")
    ml.save(model, tmp_path)
    ids = tokens(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it misses
        alone = PeftModel.from_pretrained(base, tmp_path / "adapters" / "default")
    with ml.disabled(model), torch.no_grad():
        assert torch.equal(alone(ids).logits, model(ids).logits)
