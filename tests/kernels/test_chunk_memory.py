"""chunk_memory: the closed form against the reference, and its precision and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memlayers.kernels.chunk_memory import closed
from tests.kernels.chunk_memory_cases import (
    LAYOUTS,
    ROUNDING,
    RULES,
    Layout,
    all_rules,
    call,
    check_close,
    make,
    replaced,
    tensors,
    with_gradients,
)
from tests.kernels.poisoned import poisoned  # noqa: F401

# The closed form is the reference


def check_parity(arguments, rule, layout, tolerance=ROUNDING):
    """Outputs, final state, and all gradients: by hand in the closed form, by autograd through the reference."""
    results, gradients = with_gradients(arguments, rule, layout, "cpu")
    true_results, true_gradients = with_gradients(arguments, rule, layout, "reference")
    check_close(results, true_results, tolerance)
    check_close(gradients, true_gradients, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@all_rules
def test_closed_form_equals_reference(rule, layout):
    check_parity(make(rule, layout), rule, layout)


@pytest.mark.parametrize("save_all", [0, 1e9])
@pytest.mark.parametrize("name", ["titans", "titans, two layers", "atlas", "delta"])
def test_groups_of_chunks(name, save_all, monkeypatch):
    """More chunks than are computed at a time, with the states of all chunks saved and with those of few."""
    monkeypatch.setattr(closed, "SAVE_ALL", save_all)
    monkeypatch.setattr(closed, "SAVE", 1e9)
    monkeypatch.setattr(closed, "GROUP_CHUNKS", 2)
    layout = Layout(20, 3, 1, ((0, 20), (0, 11)))
    check_parity(make(RULES[name], layout), RULES[name], layout)


@pytest.mark.parametrize(
    "layout", [Layout(4, 2, 1), Layout(4, 2, 2, ((1, 4), (0, 3)))], ids=["plain", "ragged"]
)
@all_rules
def test_gradcheck(rule, layout):
    """All tensors in, all tensors out; gradcheck also runs the backward pass twice and wants equal bits."""
    arguments = make(rule, layout, heads=1, d=2, d_v=2, hidden=2)
    leaves = [x.requires_grad_() for x in tensors(arguments) if x.numel()]

    def function(*leaves):
        results = call(replaced(arguments, iter(leaves)), rule, layout)
        return tuple(x for x in tensors(results) if x.requires_grad)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["theta", "eta", "alpha"])
@all_rules
def test_gates_at_their_limits(rule, gate, limit):
    """Exactly 0 or 1, at every second token and at all: nothing is divided by a gate, and no logarithm is taken."""
    layout = LAYOUTS["rest, whole chunks, begun"]
    arguments = make(rule, layout, size=0.5)
    index = ("q", "k", "v", "theta", "eta", "alpha").index(gate)
    if arguments[index] is None:
        return
    for step in (2, 1):
        arguments[index][..., ::step] = limit
        check_parity(arguments, rule, layout)


# Precision and memory


def long_stream(rule, dtype=torch.float32, length=8192):
    """Normalised queries and keys, and gates of which many are next to 0 and next to 1, or there."""
    layout = Layout(length, 64, 64)
    q, k, v, *_, state = make(rule, layout, heads=1, d=16, d_v=16, hidden=32, dtype=torch.float32)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    generator = torch.Generator().manual_seed(1)
    extremes = torch.tensor([0.0, 1e-30, 1e-7, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-7, 1.0])

    def gate(scale=1.0):
        return scale * extremes[torch.randint(len(extremes), q.shape[:3], generator=generator)]

    # Of two layers that learn at full step nothing is left but overflow, in any precision.
    theta = gate(0.05 if rule.depth == 2 else 1.0)
    gates = theta, gate() if rule.momentum else None, gate() if rule.decay else None
    streams = (x.bfloat16().to(dtype) for x in (q, k, v))
    return [*streams, *gates, state], layout


@pytest.mark.parametrize("name", ["titans", "titans, two layers", "atlas", "delta", "decaying sum"])
def test_bfloat16_over_a_long_stream(name):
    """The same numbers as bfloat16 and as float32: all arithmetic is float32, so results differ by what the cast
    of the result rounds off, at most 2⁻⁸ of each normal number, and states by nothing."""
    rule = RULES[name]
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        arguments, layout = long_stream(rule, dtype)
        if dtype == torch.bfloat16:
            assert arguments[0].dtype == dtype
        results[dtype] = call(arguments, rule, layout)
    (y, state), (exact, exact_state) = results[torch.bfloat16], results[torch.float32]
    assert y.dtype == torch.bfloat16 and exact.isfinite().all() and exact.abs().max() > 1
    rounding = (2.0**-8 * exact.abs()).clamp(min=torch.finfo(torch.bfloat16).tiny)
    assert ((y.float() - exact).abs() <= rounding).all()
    for a, b in zip(tensors(state), tensors(exact_state)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def saved_bytes(rule, length, d=16):
    """Bytes that a forward pass keeps for the backward pass, the arguments themselves left out."""
    layout = Layout(length, 16, 16)
    arguments = make(rule, layout, heads=1, d=d, d_v=d, hidden=d, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in tensors(arguments)]
    given = {x.untyped_storage().data_ptr() for x in leaves}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call(replaced(arguments, iter(leaves)), rule, layout)
    return sum(size for storage, size in kept.items() if storage not in given)


@pytest.mark.parametrize("name", ["titans", "titans, two layers", "delta"])
def test_memory_of_the_backward_pass(name, monkeypatch):
    """In proportion to tokens × width: a state a token would be `d` times as much as the streams of all tokens."""
    monkeypatch.setattr(closed, "SAVE_ALL", 0)
    length, d = 4096, 64
    streams = 2 * length * 3 * d * 4
    assert saved_bytes(RULES[name], length, d) < 2 * streams


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["titans", "titans, two layers", "atlas", "delta", "decaying sum"])
def test_checkpointing(name, use_reentrant):
    """Both ways of torch.utils.checkpoint give the gradients of the plain call, bit for bit."""
    rule, layout = RULES[name], LAYOUTS["rest, whole chunks, begun"]
    arguments = make(rule, layout)

    def gradients(run):
        leaves = [x.detach().clone().requires_grad_() for x in tensors(arguments)]

        def function(*leaves):
            return tuple(tensors(call(replaced(arguments, iter(leaves)), rule, layout)))

        results = run(function, *leaves)
        sum((x**2).sum() for x in results).backward()
        return [x.grad for x in leaves]

    plain = gradients(lambda function, *leaves: function(*leaves))
    again = gradients(lambda function, *leaves: checkpoint(function, *leaves, use_reentrant=use_reentrant))
    for a, b in zip(again, plain):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
