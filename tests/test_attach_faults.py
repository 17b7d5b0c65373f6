"""A fault anywhere inside `attach` leaves the model bit for bit what it was."""

import pytest
import torch
from attach_cases import BY_NAME, SOME, attach, base, check_same, lies_on, logits, unharmed, with_peft
from matrix import TEXT, llama, tokens, wrap

import memlayers as ml
from memlayers.core import hooks, methods, probe
from memlayers.kinds import module_class


class Fault(RuntimeError):
    """Stands for whatever may go wrong."""


@pytest.fixture(autouse=True)
def nothing_tried_yet(monkeypatch):
    monkeypatch.setattr(probe, "_tried", set())


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
        model.config.use_cache, model.generation_config.left = False, "behind"
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
@pytest.mark.parametrize("name", SOME)
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
        return with_peft(wrap(base(), BY_NAME[first]))

    model, expected = both(), logits(both())
    before = lies_on(model)
    with monkeypatch.context() as patch, pytest.raises(error):
        put(patch, module_class(config))
        ml.attach(model, config, name="new")
    check_same(lies_on(model), before)
    assert torch.equal(logits(model), expected)
