"""Contract 8: bf16 stays near float32, and memory itself is kept in float32."""

import torch
from matrix import LEARNS, TEXT, architectures, cases, llama, near, tokens

import memlayers as ml


def relative(got, expected):
    """Distance as a share of the expected tensor's size."""
    return float((got.float() - expected).norm() / expected.norm())


def float32_state(case, output):
    """Every field of a state is in float32; kinds without one have nothing to show."""
    for name in case.kind.configs if case.kind.stateful else ():
        for field, tensor in output.memory_state[name].items():
            assert tensor.dtype in (torch.float32, torch.int64), (name, field, tensor.dtype)


def bf16_base(model):
    """The base in bf16, memory as it was in float32."""
    memories = {name: parameter.clone() for name, parameter in ml.memory_parameters(model)}
    model.bfloat16()
    for memory in ml.memories(model).values():
        memory.float()
    for name, parameter in ml.memory_parameters(model):
        parameter.copy_(memories[name])
    return model


def near_float32(case, base_to, model_to, autocast=False):
    """The yardstick is the base alone in bf16 on the same text: memory may make that error a few times larger,
    since each segment reads what the one before rounded, but not of another order. A kind that chooses what it
    reads takes another slot where two scores are as near as bf16 rounds, and with random values that shows."""
    ids = tokens(2, TEXT)
    base, model = case.base(), case.model()
    expected_base, expected = base(ids).logits, model(ids).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        yardstick, output = base_to(base)(ids).logits, model_to(model)(ids)
    assert output.logits.isfinite().all()
    error, floor = relative(output.logits, expected), relative(yardstick, expected_base)
    slack = 0.15 if case.kind.chooses else 0.01
    assert 0 < error < 6 * floor + slack, f"relative error {error:.4f}, the base alone has {floor:.4f}"
    float32_state(case, output)


@torch.no_grad()
@cases()
def test_a_bf16_base_with_float32_memory_is_near_float32(case):
    near_float32(case, torch.nn.Module.bfloat16, bf16_base)


@torch.no_grad()
@cases()
def test_autocast_is_near_float32(case):
    near_float32(case, lambda base: base, lambda model: model, autocast=True)


@torch.no_grad()
@architectures()
def test_bf16_throughout_is_near_float32(case):
    near_float32(case, torch.nn.Module.bfloat16, torch.nn.Module.bfloat16)


@cases(*LEARNS)
def test_training_under_autocast(case):
    """Gradients of float32 parameters are float32, finite, and near those without autocast."""
    ids, results = case.tokens(2, TEXT), []
    for enabled in (False, True):
        model = case.model().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(ids, labels=ids, close_memory=True)
        float32_state(case, output)
        output.loss.backward()
        results.append(
            (output.loss.detach(), torch.cat([p.grad.flatten() for _, p in ml.memory_parameters(model)]))
        )
    (loss, gradient), (bf16_loss, bf16_gradient) = results
    near(bf16_loss.float(), loss, 0.05)
    assert bf16_gradient.dtype == torch.float32 and bf16_gradient.isfinite().all()
    assert torch.cosine_similarity(bf16_gradient, gradient, dim=0) > 0.9


@torch.no_grad()
@cases(scope="all")
def test_a_bf16_model_generates_and_continues_a_state(case):
    model = case.base().bfloat16()
    for name, config in case.kind.configs.items():
        ml.attach(model, config, name=name)
    assert all(p.dtype == torch.float32 for _, p in ml.memory_parameters(model))
    first, ids = model(tokens(2, TEXT)), tokens(2, 3, seed=4)
    float32_state(case, first)
    given = {"past_key_values": first.memory_state.to_cache()} if case.kind.stateful else {}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **given)
    assert out.shape == (2, 12)


def test_float64_is_not_rounded_on_the_way():
    """A text inside the first segment reads only learned memory: no float32 state stands in between."""
    model, ids = llama().model().double(), tokens(2, 4)
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.float64
