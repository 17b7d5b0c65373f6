"""`torch.compile` over models with memory: the same logits in any order of compiling, attaching and detaching."""

import copy

import pytest
import torch
import torch.distributed as dist
from matrix import TEXT, llama, near, same_state, tokens, wrap
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

import memlayers as ml

KINDS = [
    *("recurrent", "accumulate", "prefix", "neural_mag", "neural_mac", "lora", "cartridge"),
    *("associative", "reversible", "product_key", "task_tokens"),
]
STATELESS = ("base", "product_key", "task_tokens")
SOME = ["recurrent", "neural_mag", "lora", "product_key", "task_tokens"]
some_kinds = pytest.mark.parametrize("name", SOME)

IN_TURN = ["base", "product_key", "lora", "task_tokens", "recurrent"]
ORDERS = [way[i:] + way[:i] for way in (IN_TURN, IN_TURN[::-1]) for i in (0, 2)]
"""Every kind stands before and behind every other."""

graphs = []


def eager(graph, inputs):
    """The backend `eager`, counted."""
    graphs.append(graph)
    return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    graphs.clear()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, backend=eager)


def given(model, name):
    return {} if name in STATELESS else {"memory_state": ml.write(model, tokens(2, TEXT, seed=3))}


def case_of(name):
    return llama("recurrent" if name == "base" else name)


def ids_of(name):
    return tokens(2, TEXT) if name == "base" else llama(name).tokens(2, TEXT)


def agree(wrapped, model, name, ids=None):
    """`wrapped` gives what `model` by itself gives."""
    ids, state = ids_of(name) if ids is None else ids, given(model, name)
    with torch.no_grad():
        expected, got = model(input_ids=ids, **state), wrapped(input_ids=ids, **state)
    assert got.logits.shape == expected.logits.shape
    near(got.logits, expected.logits)
    if name not in STATELESS:
        same_state(got.memory_state, expected.memory_state)
    return expected.logits


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order_of_models_in_one_process(order):
    kept = []
    for name in order:
        model = case_of(name).base() if name == "base" else case_of(name).model()
        wrapped = compiled(model)
        agree(wrapped, model, name)
        if name == "base":
            assert graphs, "the base was not compiled at all"
        kept.append((wrapped, model, name))
    for wrapped, model, name in kept:  # and each of them again, behind all others
        agree(wrapped, model, name)
        agree(wrapped, model, name, ids_of(name)[:, :6])


HOW = {
    "wrapped": lambda model: torch.compile(model, backend=eager),
    "in_place": lambda model: model.compile(backend=eager) or model,
    "its_forward": lambda model: (
        setattr(model, "forward", torch.compile(model.forward, backend=eager)) or model
    ),
    "its_layers": lambda model: [layer.compile(backend=eager) for layer in model.model.layers] and model,
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "wrapped") for name in KINDS),
        *((name, how) for name in SOME for how in ("in_place", "its_forward")),
        ("recurrent", "its_layers"),  # which takes longest
    ],
)
def test_attached_and_detached_after_compiling(name, how):
    case = llama(name)
    model, ids = case.base(), tokens(2, TEXT)
    wrapped = HOW[how](model)
    with torch.no_grad():
        base = case.base()(ids).logits
        near(wrapped(ids).logits, base)
        n_graphs = len(graphs)
        assert n_graphs > 0
        wrap(wrapped, case.kind)
        reference = case.model()
        state = given(reference, name)
        expected = reference(case.tokens(2, TEXT), **state).logits
        got = wrapped(case.tokens(2, TEXT), **state).logits
        assert got.shape == expected.shape
        near(got, expected)
        with ml.disabled(wrapped):
            near(wrapped(ids).logits, base)
        near(wrapped(case.tokens(2, TEXT), **state).logits, expected)
        if name != "task_tokens":
            assert (got - base).abs().max() > 1e-2
        again = ml.detach(wrapped)
        assert again is model
        near(wrapped(ids).logits, base)
        wrap(wrapped, case.kind)  # and a second time
        near(wrapped(case.tokens(2, TEXT), **state).logits, expected)


@some_kinds
def test_a_compiled_model_is_looked_at_and_saved(name, tmp_path):
    case = llama(name)
    model = case.model()
    wrapped = compiled(model)
    assert ml.memories(wrapped) == ml.memories(model) != {}
    names = dict(ml.memory_parameters(wrapped))
    assert names.keys() == dict(ml.memory_parameters(model)).keys() and names
    assert all(p is q for p, (_, q) in zip(names.values(), ml.memory_parameters(model)))
    ids = case.tokens(2, TEXT)
    if name not in STATELESS:
        same_state(ml.write(wrapped, ids), ml.write(model, ids))
    expected = agree(wrapped, model, name)
    ml.save(wrapped, tmp_path)
    loaded = ml.load(tmp_path, base=case.base())
    near(loaded(ids, **given(loaded, name)).logits, expected)
    into = ml.load(tmp_path, base=compiled(case.base()))
    near(into(ids, **given(into, name)).logits, expected)
    answers = [
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        for m in (wrapped, model)
    ]
    assert torch.equal(*answers)
    ml.detach(wrapped)
    assert ml.memories(wrapped) == {}
    near(wrapped(tokens(2, 4)).logits, case.base()(tokens(2, 4)).logits)


@some_kinds
def test_memory_is_trained_through_it(name):
    case = llama(name)
    model, ids = case.model().train(), case.tokens(2, TEXT)
    extra = {} if name in STATELESS else {"close_memory": True}

    def gradients(call):
        model.zero_grad()
        call(input_ids=ids, labels=ids, **extra).loss.backward()
        return {n: p.grad.clone() for n, p in ml.memory_parameters(model) if p.grad is not None}

    expected, got = gradients(model), gradients(compiled(model))
    assert got.keys() == expected.keys() and any(g.abs().max() > 0 for g in got.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, atol=1e-6, rtol=1e-4, msg=parameter)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@some_kinds
def test_two_wrappers_of_one_model_in_turn(name, one_process):
    model = llama(name).model()
    wrappers = [compiled(model), DistributedDataParallel(model), compiled(DistributedDataParallel(model))]
    for wrapper in [*wrappers, *wrappers[::-1]]:
        agree(wrapper, model, name)
        assert ml.memories(wrapper) == ml.memories(model)


@some_kinds
def test_compiled_and_peft_in_turn(name):
    model = llama(name).model()
    wrapped = compiled(model)
    agree(wrapped, model, name)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    plain = agree(wrapped, model, name)
    adapted = get_peft_model(model, config).eval()
    for _ in range(2):
        with_adapter = agree(adapted, model, name)
        near(agree(wrapped, model, name), with_adapter)
        with adapted.disable_adapter():
            near(agree(wrapped, model, name), plain)
    assert (with_adapter - plain).abs().max() > 1e-3
    agree(compiled(adapted), model, name)


@some_kinds
def test_a_copy_of_a_compiled_model_is_a_model_of_its_own(name):
    model = llama(name).model()
    wrapped = compiled(model)
    agree(wrapped, model, name)
    other = copy.deepcopy(wrapped)
    agree(other, model, name)
    with torch.no_grad():
        for _, parameter in ml.memory_parameters(other):
            parameter.add_(1.0)
    agree(other, other._orig_mod, name)
    state = given(model, name)
    with torch.no_grad():
        far = (other(ids_of(name), **state).logits - wrapped(ids_of(name), **state).logits).abs().max()
    assert far > 1e-3 or name in ("lora", "cartridge")  # which read what the state holds alone
