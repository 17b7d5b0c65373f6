"""Models that their users have worked on, and whether they are bit for bit as before: for the tests of `attach`."""

import contextlib

import torch
from matrix import KINDS, TEXT, llama, tokens, wrap
from peft import LoraConfig, get_peft_model

import memlayers as ml
from memlayers.core import hooks
from memlayers.core.call import BLOCK, CALL
from memlayers.core.memory import DISABLED

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


def base():
    """With modes, frozen parts, hooks and a method of the user's own."""
    model = llama().base().train()
    model.model.layers[0].mlp.eval()
    next(model.parameters()).requires_grad_(False)
    model.config.note, model.generation_config.note = ["mine"], ["mine"]
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    model.lm_head.forward = model.lm_head.forward
    return model


def with_memory(name="product_key"):
    return wrap(base(), BY_NAME[name])


def with_peft(model=None):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    return get_peft_model(base() if model is None else model, config)


def attach(model, name, **options):
    """Attach the memories of a kind."""
    for memory, config in BY_NAME[name].configs.items():
        ml.attach(model, config, name=f"new_{memory}", **options)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens(2, TEXT) if ids is None else ids).logits


def lies_on(model):
    """All that lies on a model: what its modules, their classes, its configs and parameters hold; its tensors with their
    values; and what holds in the process."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    things = {"modules": dict(model.named_modules())}
    for name, module in model.named_modules():
        held = {key: dict(x) if isinstance(x, dict) else x for key, x in vars(module).items()}
        things[f"module {name}"], things[f"class of {name}"] = held, dict(vars(type(module)))
    for config in (inner.config, inner.generation_config):
        things[type(config).__name__] = dict(vars(config))
    things["parameters"] = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    process = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    process += [torch.is_autocast_enabled("cpu"), BLOCK.get(), CALL.get(), DISABLED.get(), hooks.SEEN.get()]
    things["process"] = dict(enumerate(process))
    tensors = model.state_dict(keep_vars=True).items()
    return things, {name: (x, x.detach().clone(), x._version) for name, x in tensors}


def check_same(now, before):
    """The same objects under the same names in the same order; the same values of tensors."""
    assert list(now[0]) == list(before[0])
    for where, things in now[0].items():
        assert list(things) == list(before[0][where]), where
        for key, thing in things.items():
            assert _same(thing, before[0][where][key]), (where, key)
    assert list(now[1]) == list(before[1])
    for name, (tensor, value, version) in before[1].items():
        got = now[1][name][0]
        assert got is tensor and got._version == version and torch.equal(got, value), name


def _same(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    simple = isinstance(one, (int, float, str, frozenset))
    return one is other or (simple and type(one) is type(other) and one == other)


@contextlib.contextmanager
def unharmed(model, ids=None):
    """What happens inside leaves the model as it is."""
    expected = logits(model, ids)
    before = lies_on(model)
    yield
    check_same(lies_on(model), before)
    assert torch.equal(logits(model, ids), expected)
