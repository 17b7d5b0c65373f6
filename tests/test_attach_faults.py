"""A fault anywhere inside `attach` leaves the model bit for bit what it was; what it tries on the way leaves nothing either."""

import contextlib

import pytest
import torch
from architectures import tiny
from matrix import KINDS, TEXT, llama, says, tokens, wrap
from peft import LoraConfig, get_peft_model

import memlayers as ml
from memlayers.core import hooks, methods, probe
from memlayers.core.call import BLOCK, CALL
from memlayers.core.memory import DISABLED
from memlayers.kinds import module_class

BY_NAME = {kind.name: kind for kind in KINDS}
SOME = [
    *(
        "recurrent",
        "prefix",
        "product_key",
        "product_key_replace",
        "neural_mag",
        "neural_mac",
        "neural_window",
    ),
    *("lora", "cartridge", "prompt", "associative", "reversible", "task_tokens"),
]
some_kinds = pytest.mark.parametrize("name", SOME)


class Fault(RuntimeError):
    """Stands for whatever may go wrong."""


@pytest.fixture(autouse=True)
def nothing_tried_yet(monkeypatch):
    monkeypatch.setattr(probe, "_tried", set())


def base():
    """A model that its user has worked on: modes, frozen parts, hooks and a method of the user's own."""
    model = llama().base().train()
    model.model.layers[0].mlp.eval()
    next(model.parameters()).requires_grad_(False)
    model.config.note, model.generation_config.note = ["mine"], ["mine"]
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    model.lm_head.forward = model.lm_head.forward
    return model


def with_memory(name="product_key"):
    return wrap(base(), BY_NAME[name])


def with_peft():
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base(), config)


MODELS = {"base": base, "memory": with_memory, "peft": with_peft}


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens(2, TEXT) if ids is None else ids).logits


def lies_on(model):
    """All that lies on a model: what each module, each class of them and each config holds, and the values of tensors."""

    def held(value):
        return list(value.items()) if isinstance(value, dict) else value

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    things = {"modules": [(name, module) for name, module in model.named_modules()]}
    for name, module in model.named_modules():
        things[name] = {key: held(value) for key, value in vars(module).items()}
        things[f"class of {name}"] = [*vars(type(module)).items()]
    for config in (inner.config, inner.generation_config):
        things[type(config).__name__] = dict(vars(config))
    values = {name: (x, x.clone(), x._version) for name, x in model.state_dict(keep_vars=True).items()}
    parameters = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    state = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    process = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    process += [BLOCK.get(), CALL.get(), DISABLED.get(), hooks.SEEN.get(), torch.get_num_threads()]
    return things, values, parameters, state, process


def check_same(now, before):
    for things, others in zip(now[:1] + now[2:], before[:1] + before[2:]):
        assert type(things) is type(others) and len(things) == len(others)
        for key in things if isinstance(things, dict) else range(len(things)):
            got, expected = things[key], others[key]
            if isinstance(got, dict):
                assert list(got) == list(expected), key
                assert all(same(got[k], expected[k]) for k in got), key
            else:
                assert same(got, expected), key
    assert list(now[1]) == list(before[1])
    for name, (tensor, _, version) in now[1].items():
        was, value, old_version = before[1][name]
        assert tensor is was and version == old_version and torch.equal(tensor, value), name


def same(one, other):
    """The same objects, one by one."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    simple = isinstance(one, (int, float, str, frozenset, torch.dtype))
    return one is other or (simple and type(one) is type(other) and one == other)


@contextlib.contextmanager
def unharmed(model):
    """What happens inside leaves the model as it is."""
    expected = logits(model)
    before = lies_on(model)
    yield
    check_same(lies_on(model), before)
    assert torch.equal(logits(model), expected)


def attach(model, name, **options):
    for memory, config in BY_NAME[name].configs.items():
        ml.attach(model, config, name=f"new_{memory}", **options)


# Places where something goes wrong while a memory is attached: functions that put the fault there.


def after(patch, owner, name, number=1, error=Fault):
    """From its call `number` on, the method `name` of a class does what it does and then raises."""
    whole, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        result = whole(*args, **kwargs)
        calls.append(name)
        if len(calls) >= number:
            raise error(f"{name} went wrong")
        return result

    patch.setattr(owner, name, method)


def in_for_model(patch, kind):
    """It changes much of the model before it raises."""
    build = kind.for_model

    def for_model(config, model):
        build(config, model)
        model.register_forward_pre_hook(lambda *_: None)
        model.config.use_cache, model.generation_config.left = "changed", "behind"
        del model.config.note
        layers = model.model.layers
        layers[0].left = torch.nn.Linear(2, 2)
        layers[1].forward = model.forward
        del layers[1]._modules["mlp"]
        model.eval().requires_grad_(True)
        raise Fault

    patch.setattr(kind, "for_model", for_model)


def of_a_wrong_width(patch, kind):
    """The memory is made for a model half as wide, which only trying finds out."""
    build = kind.for_model
    options = dict(hidden_size=16, intermediate_size=24, head_dim=4, vocab_size=512)
    config = type(llama().base().config)(**{**llama().base().config.to_dict(), **options})
    narrow = type(llama().base())(config)
    patch.setattr(kind, "for_model", lambda config, model: build(config, narrow))


def in_a_step(step, error=Fault, problem=None):
    def put(patch, kind):
        def broken(model, name, memory):
            if problem is None:
                raise error("a step")
            return problem

        patch.setitem(probe.STEPS, step, broken)

    return put


def in_a_layer(number, error):
    """An MLP goes wrong at its call `number` while the model is tried."""
    return lambda patch, kind: after(
        patch, type(llama().base().model.layers[0].mlp), "forward", number, error
    )


def at(owner, name, number=1, error=Fault):
    return lambda patch, kind: after(patch, owner or kind, name, number, error)


FAULTS = {
    "for_model": (in_for_model, Fault),
    "to": (at(None, "to"), Fault),
    "interrupted to": (at(None, "to", error=KeyboardInterrupt), KeyboardInterrupt),
    "install": (at(None, "install"), Fault),
    "interrupted install": (at(None, "install", error=KeyboardInterrupt), KeyboardInterrupt),
    "width": (of_a_wrong_width, ml.ConfigError),
    **{f"step {step}": (in_a_step(step), ml.ConfigError) for step in probe.STEPS},
    "what a step found": (in_a_step("padding", problem="it is wrong"), ml.ConfigError),
    "interrupted step": (in_a_step("reading", KeyboardInterrupt), KeyboardInterrupt),
    "no memory left": (in_a_step("writing", torch.OutOfMemoryError), torch.OutOfMemoryError),
    "first layer": (in_a_layer(1, KeyboardInterrupt), KeyboardInterrupt),
    "a later layer": (in_a_layer(6, KeyboardInterrupt), KeyboardInterrupt),
}
OVERRIDES = {  # only with the first memory of a model
    "second override": (at(hooks.MethodOverride, "__init__", 2), Fault),
    "second layer": (at(hooks.LayerHook, "__init__", 2), Fault),
    "interrupted layer": (at(hooks.LayerHook, "__init__", error=KeyboardInterrupt), KeyboardInterrupt),
    "prepare inputs": (at(methods.PrepareInputs, "__init__"), Fault),
    "the config's key": (at(hooks.IgnoredKey, "__init__"), Fault),
}


@pytest.mark.parametrize("place", [*FAULTS, *OVERRIDES])
@some_kinds
def test_a_fault_while_attaching(name, place, monkeypatch):
    put, error = {**FAULTS, **OVERRIDES}[place]
    (config,) = BY_NAME[name].configs.values()
    model = base()
    with unharmed(model):
        with monkeypatch.context() as patch, pytest.raises(error):
            put(patch, module_class(config))
            ml.attach(model, config)
    assert ml.memories(model) == {}
    ml.attach(model, config)  # and works without the fault


PART_OF_IT = ["neural_mag", "neural_mac", "lora", "cartridge", "product_key"]


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("name", PART_OF_IT)
def test_a_fault_between_the_hooks_of_a_memory(name, error, monkeypatch):
    model = base()
    with unharmed(model), pytest.raises(error):
        after(monkeypatch, hooks.PartHook, "__init__", 2, error)
        attach(model, name)


@pytest.mark.parametrize("place", FAULTS)
@pytest.mark.parametrize(
    "first, name", [("recurrent", "associative"), ("lora", "cartridge"), ("task_tokens", "neural_mag")]
)
def test_a_memory_that_was_there_works_on(first, name, place, monkeypatch):
    put, error = FAULTS[place]
    (config,) = BY_NAME[name].configs.values()
    model = wrap(base(), BY_NAME[first])
    ids, kept = tokens(2, TEXT), BY_NAME[first].stateful
    state = ml.write(model, tokens(2, TEXT, seed=3)) if kept else None
    memory = {"memory_state": state} if kept else {}
    with torch.no_grad():
        expected = model(ids, **memory).logits
        with unharmed(model):
            with monkeypatch.context() as patch, pytest.raises(error):
                put(patch, module_class(config))
                ml.attach(model, config, name="new")
        assert torch.equal(model(ids, **memory).logits, expected)
        if kept:
            again = ml.write(model, tokens(2, TEXT, seed=3))
            assert all(torch.equal(again[n][f], x) for n in state.fields for f, x in state[n].items())
        ml.detach(model)
        assert torch.equal(model(ids).logits, logits(llama().base(), ids))


@pytest.mark.parametrize("place", FAULTS)
@pytest.mark.parametrize("name", ["recurrent", "lora", "product_key"])
def test_a_model_with_an_adapter_of_peft(name, place, monkeypatch):
    put, error = FAULTS[place]
    (config,) = BY_NAME[name].configs.values()
    model = with_peft()
    with unharmed(model):
        with monkeypatch.context() as patch, pytest.raises(error):
            put(patch, module_class(config))
            ml.attach(model, config)


@pytest.mark.parametrize("place", ["install", "step reading", "interrupted step"])
@pytest.mark.parametrize("first", ["lora", "product_key", "cartridge"])
def test_hooks_that_have_yet_to_follow_an_adapter(first, place, monkeypatch):
    """PEFT came after the first memory, and the second is refused while it follows."""
    put, error = FAULTS[place]
    (config,) = BY_NAME["task_tokens"].configs.values()

    def both():
        adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        return get_peft_model(wrap(base(), BY_NAME[first]), adapter)

    model, expected = both(), logits(both())
    before = lies_on(model)
    with monkeypatch.context() as patch, pytest.raises(error):
        put(patch, module_class(config))
        ml.attach(model, config, name="new")
    check_same(lies_on(model), before)
    assert torch.equal(logits(model), expected)


# Configs that do not fit, and models that no memory works in.


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
    "xlnet": ["associative"],
    "gpt_neo": ["cartridge"],
    "jamba": ["neural_mac", "lora"],
    "minimax": ["recurrent", "reversible"],
    "bert": ["recurrent", "product_key"],
}


@pytest.mark.parametrize("architecture, name", [(a, name) for a, names in ODD.items() for name in names])
def test_an_architecture_that_memory_does_not_work_in(architecture, name):
    model, ids = tiny(architecture).build().train(), tokens(2, 7) % 128
    ids[:] = ids.clamp(min=3)
    model.eval()
    expected, before = logits(model, ids), lies_on(model)
    with pytest.raises((ml.ConfigError, TypeError), match=says(type(model).__name__)):
        attach(model, name)
    check_same(lies_on(model), before)
    assert torch.equal(logits(model, ids), expected)
