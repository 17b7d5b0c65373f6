"""What `attach` refuses, on a model that stays bit for bit what it was; and what it tries, of which nothing stays."""

import contextlib

import pytest
import torch
from architectures import tiny
from attach_cases import BY_NAME, attach, base, logits, unharmed, with_memory, with_peft
from matrix import KINDS, TEXT, llama, says, tokens, wrap
from peft import LoraConfig, get_peft_model

import memlayers as ml
from memlayers.core import probe

MODELS = {"base": base, "memory": with_memory, "peft": with_peft}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def nothing_tried_yet(monkeypatch):
    monkeypatch.setattr(probe, "_tried", set())


def of(name, **fields):
    (config,) = BY_NAME[name].configs.values()
    return type(config)(**{**config.model_dump(), **fields})


REFUSED = [
    ("product_key", of("product_key", layers=[9]), "layers"),
    ("neural_mag", of("product_key", layers=[-9]), "layers"),
    ("recurrent", of("recurrent", n_tokens=48), "n_tokens"),
    ("recurrent", of("recurrent", segment_length=96), "segment_length"),
    ("recurrent", of("recurrent", segment_length=6), "segment_length"),
    ("recurrent", of("learned_linear", write_layer=7), "write_layer"),
    ("recurrent", of("neural_mag"), "every token"),
    ("recurrent", of("lora"), "gradient steps"),
    ("lora", of("recurrent"), "gradient steps"),
    ("lora", of("lora", target_modules=["nothing"]), "target_modules"),
    ("cartridge", of("cartridge", n_tokens=96), "n_tokens"),
    ("cartridge", of("neural_window"), "gradient steps"),
    ("neural_mag", of("recurrent"), "every token"),
    ("neural_mag", of("neural_mag", layers=[5]), "layers"),
    ("neural_window", of("neural_window", sliding_window=5), "sliding_window"),
    ("neural_mac", of("associative", segment_length=4), "segment_length"),
    ("associative", of("associative", layers=[2]), "layers"),
    ("reversible", of("neural_mal"), "every token"),
    ("task_tokens", of("task_tokens"), "task tokens"),
    ("product_key_replace", of("product_key_replace"), "takes the place"),
]


@pytest.mark.parametrize("peft", [False, True], ids=["", "peft"])
@pytest.mark.parametrize("first, config, why", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_config_that_does_not_fit(first, config, why, peft):
    model = with_memory(first)
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    with unharmed(model), pytest.raises(ml.ConfigError, match=says(why)):
        ml.attach(model, config, name="new")
    assert list(ml.memories(model)) == list(BY_NAME[first].configs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["facts", "", "a.b", "pending", "keys", 3])
def test_a_name_that_cannot_be(model, name):
    model = MODELS[model]()
    if name == "facts" and not ml.memories(model):
        ml.attach(model, of("product_key"), name=name)
    with unharmed(model), pytest.raises((ValueError, AttributeError, TypeError)):
        ml.attach(model, of("neural_mag"), name=name)


ODD = {
    "mamba": ["recurrent", "product_key", "neural_mag", "lora", "task_tokens"],
    "rwkv": ["prefix", "cartridge", "associative", "reversible"],
    "bloom": ["neural_mac", "neural_window", "cartridge"],
    "openai-gpt": ["recurrent", "lora", "neural_mag"],
    "recurrent_gemma": ["recurrent", "product_key"],
    "ctrl": ["neural_mag", "cartridge"],
    "xlnet": ["product_key"],
    "gpt_neo": ["cartridge"],
    "jamba": ["neural_mac", "lora"],
    "minimax": ["recurrent", "reversible"],
    "bert": ["recurrent", "product_key"],
}


@pytest.mark.parametrize("architecture, name", [(a, name) for a, names in ODD.items() for name in names])
def test_an_architecture_that_memory_does_not_work_in(architecture, name):
    model = tiny(architecture).build()
    with unharmed(model, 3 + tokens(2, 7) % 120), pytest.raises((ml.ConfigError, TypeError)) as error:
        attach(model, name)
    assert type(model).__name__ in str(error.value)


# What is tried.


MODES = {"plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@every_kind
def test_trying_leaves_nothing(kind, mode):
    """No gradient, no random number drawn, no other mode; and the memory is there."""
    tried, untried, after = base(), base(), []
    for model, try_it in [(tried, True), (untried, False)]:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5  # which draws random numbers in training
        torch.manual_seed(7)
        with MODES[mode]():
            for name, config in kind.configs.items():
                ml.attach(model, config, name=name, try_it=try_it)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    assert bool(probe._tried)  # it did try
    assert all(p.grad is None for p in tried.parameters())
    modes = [
        [(name, module.training) for name, module in model.named_modules()] for model in (tried, untried)
    ]
    assert modes[0] == modes[1]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    for (name, one), (other_name, other) in zip(tried.state_dict().items(), untried.state_dict().items()):
        assert name == other_name and torch.equal(one, other)
    ids = tokens(2, TEXT)
    with torch.no_grad():
        assert torch.equal(tried.eval()(ids).logits, untried.eval()(ids).logits)
    assert torch.equal(logits(ml.detach(tried)), logits(llama().base()))


@pytest.mark.parametrize("architecture", ["stablelm", "gptj", "bloom"])
@every_kind
def test_layers_that_are_handed_no_keywords_read(kind, architecture):
    """Memory finds its pass whatever an architecture hands on: what is read moves the logits."""
    model, ids = tiny(architecture).build(), 3 + tokens(2, 7) % 120
    if architecture == "bloom" and kind.name in (
        "neural_mac",
        "neural_window",
        "cartridge",
        "prompt",
        "cartridge_text",
    ):
        with pytest.raises(ml.ConfigError, match=says("BloomForCausalLM")):
            wrap(model, kind)
        return
    expected = logits(model, ids)
    wrap(model, kind)
    with torch.no_grad():
        if kind.stateful:
            states = [ml.write(model, 3 + tokens(2, TEXT, seed=seed) % 120) for seed in (1, 2)]
            one, other = (model(ids, memory_state=state).logits for state in states)
            assert (one - other).abs().max() > 1e-3
        else:
            one = model(ids).logits[..., : expected.shape[-1]]
        if kind.n_new_tokens:
            assert model(ids).logits.shape[-1] == expected.shape[-1] + kind.n_new_tokens
        else:
            assert (one - expected).abs().max() > 1e-3
        with ml.disabled(model):
            assert torch.equal(model(ids).logits, expected)
