"""chunk_memory: the closed form against the reference, and both against what they should mean."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memlayers.kernels.chunk_memory import closed, reference
from tests.kernels.chunk_memory_cases import (
    LAYOUTS,
    RULES,
    Layout,
    call,
    check_close,
    make,
    replaced,
    tensors,
    with_gradients,
)

ROUNDING = 1e-12  # float64: sums of some dozen terms of about 1, taken in another order; the bar is 1e-10
TITANS, DELTA = RULES["titans"], RULES["delta"]
PATHS = ["reference", "cpu"]
all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so what a path forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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


# The reference is right


@pytest.mark.parametrize("window", [1, 3])
def test_inner_gradient_of_a_linear_memory(window):
    """2 kᵀ (kM − v), summed over the window."""
    memory, k, v = (
        torch.randn(2, 3, *shape, dtype=torch.float64) for shape in ((4, 5), (window, 4), (window, 5))
    )
    (gradient,) = reference.inner_gradient([memory], k, v)
    expected = sum(2 * k[..., i, :, None] * (k @ memory - v)[..., i, None, :] for i in range(window))
    check_close([gradient], [expected], ROUNDING)


def test_inner_gradient_of_two_layers():
    first, second, k, v = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6), (6, 5), (1, 4), (1, 5))
    )
    gradients = reference.inner_gradient([first, second], k, v)
    h = k @ first
    slope = 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * torch.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    error = 2 * (F.gelu(h) @ second - v)
    check_close(gradients, [k.T @ (error @ second.T * slope), F.gelu(h).T @ error], ROUNDING)


@pytest.mark.parametrize("path", PATHS)
def test_chunks_of_one_token_are_the_online_rule(path):
    """Titans, equations 13 and 14, written down once more."""
    layout = Layout(9, 1, 1)
    arguments = q, k, v, theta, eta, alpha, state = make(TITANS, layout)
    m, s = state.weights[0], state.momentum[0]
    arguments[-1] = state._replace(anchor=state.weights)
    expected = []
    for t in range(layout.length):
        key, value = k[:, :, t, None], v[:, :, t, None]
        step, momentum, decay = (gate[:, :, t, None, None] for gate in (theta, eta, alpha))
        s = momentum * s - step * 2 * key.mT @ (key @ m - value)
        m = (1 - decay) * m + s
        expected.append(q[:, :, t, None] @ m)
    y, after = call(arguments, TITANS, layout, path)
    check_close([y, *after.weights, *after.momentum], [torch.cat(expected, 2), m, s], ROUNDING)
    assert torch.equal(after.anchor[0], after.weights[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_delta_rule(chunk_size, path):
    """Gated delta rule: each gradient at the decayed memory of its own token, whatever the chunks."""
    layout = Layout(9, chunk_size, 1)
    q, k, v, theta, _, alpha, state = arguments = make(DELTA, layout)
    m, expected = state.weights[0], []
    for t in range(layout.length):
        key, value = k[:, :, t, None], v[:, :, t, None]
        m = (1 - alpha[:, :, t, None, None]) * m
        m = m - theta[:, :, t, None, None] * 2 * key.mT @ (key @ m - value)
        expected.append(q[:, :, t, None] @ m)
    y, after = call(arguments, DELTA, layout, path)
    check_close([y, *after.weights], [torch.cat(expected, 2), m], ROUNDING)


@pytest.mark.parametrize("path", PATHS)
def test_decaying_sum(path):
    rule, layout = RULES["decaying sum"], Layout(9, 4, 2)
    q, k, v, theta, _, alpha, state = arguments = make(rule, layout)
    m = state.weights[0]
    for t in range(layout.length):
        m = (1 - alpha[:, :, t, None, None]) * m + theta[:, :, t, None, None] * k[:, :, t, :, None] * v[
            :, :, t, None
        ]
    y, after = call(arguments, rule, layout, path)
    check_close([y[:, :, -1:], *after.weights], [q[:, :, -1:] @ m, m], ROUNDING)


@pytest.mark.parametrize("path", PATHS)
def test_limits(path):
    """θ = 0: the memory only fades. α = 1 without momentum: it holds the last step. η = 0: there is no momentum."""
    layout = Layout(6, 4, 4)
    q, k, v, theta, eta, alpha, state = make(TITANS, layout)
    state = state._replace(momentum=tuple(torch.zeros_like(s) for s in state.momentum))
    y, _ = call((q, k, v, 0 * theta, eta, alpha, state), TITANS, layout, path)
    check_close([y], [(1 - alpha).cumprod(2)[..., None] * (q @ state.weights[0])], ROUNDING)

    alone, bare = RULES["no momentum"], state._replace(momentum=())
    y, _ = call((q, k, v, theta, None, torch.ones_like(alpha), bare), alone, layout, path)
    error = (v - k @ state.anchor[0])[:, :, :4]
    expected = 2 * theta[..., None][:, :, :4] * (q * k)[:, :, :4].sum(-1, keepdim=True) * error
    check_close([y[:, :, :4]], [expected], ROUNDING)

    y, after = call((q, k, v, theta, 0 * eta, alpha, state), TITANS, layout, path)
    expected = call((q, k, v, theta, None, alpha, bare), alone, layout, path)
    check_close([y, *after.weights, *after.anchor], tensors(expected), ROUNDING)


# Calls, rows and the future


def cut(arguments, start, stop, state):
    """The tokens from start to stop, from `state` on."""
    return [None if x is None else x[:, :, start:stop] for x in arguments[:-1]] + [state]


def left_open(layout, n_tokens):
    """How many tokens still fit into the open chunk after n_tokens."""
    return layout.chunk_size - (layout.chunk_size - layout.first + n_tokens) % layout.chunk_size


def in_pieces(arguments, rule, layout, ends, path="cpu"):
    start, state, outputs = 0, arguments[-1], []
    for stop in [*ends, layout.length]:
        piece = Layout(stop - start, layout.chunk_size, left_open(layout, start))
        y, state = call(cut(arguments, start, stop, state), rule, piece, path)
        outputs.append(y)
        start = stop
    return tensors(torch.cat(outputs, 2), state)


@pytest.mark.parametrize("path", PATHS)
@all_rules
def test_a_stream_may_be_split_anywhere(rule, path):
    layout = LAYOUTS["rest, whole chunks, begun"]
    arguments = make(rule, layout)
    whole = tensors(call(arguments, rule, layout, path))
    for end in range(1, layout.length):
        check_close(in_pieces(arguments, rule, layout, [end], path), whole, ROUNDING)
    check_close(in_pieces(arguments, rule, layout, range(1, layout.length), path), whole, ROUNDING)


@pytest.mark.parametrize("path", PATHS)
@all_rules
def test_rows_of_a_ragged_batch_are_as_each_by_itself(rule, path):
    layout = LAYOUTS["ragged"]
    arguments = make(rule, layout)
    y, after = call(arguments, rule, layout, path)
    for row, (start, stop) in enumerate(layout.spans):
        pick = replaced(arguments, iter([x[row : row + 1] for x in tensors(arguments)]))
        own_after = pick[-1]
        if stop > start:
            own = Layout(stop - start, layout.chunk_size, layout.first - start)
            own_y, own_after = call(cut(pick, start, stop, pick[-1]), rule, own, path)
            check_close([y[row : row + 1, :, start:stop]], [own_y], ROUNDING)
        check_close([x[row : row + 1] for x in tensors(after)], tensors(own_after), ROUNDING)
        inactive = torch.cat((y[row, :, :start], y[row, :, stop:]), 1)
        assert not inactive.any()


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_active_is_not_looked_at(path):
    layout = LAYOUTS["ragged"]
    arguments = make(TITANS, layout)
    expected = tensors(call(arguments, TITANS, layout, path))
    for row, (start, stop) in enumerate(layout.spans):
        for stream in arguments[:-1]:
            stream[row, :, :start] = stream[row, :, stop:] = math.nan
    for actual, other in zip(tensors(call(arguments, TITANS, layout, path)), expected):
        assert torch.equal(actual, other)


@all_rules
def test_rows_do_not_see_each_other(rule):
    """Alone as beside others. A library may sum in another order in a larger batch of products."""
    layout = Layout(11, 4, 3, ((0, 11), (0, 11), (0, 11)))
    arguments = make(rule, layout)
    layout = layout._replace(spans=None)
    together = tensors(call(arguments, rule, layout))
    for row in range(3):
        alone = replaced(arguments, iter([x[row : row + 1] for x in tensors(arguments)]))
        by_itself = tensors(call(alone, rule, layout))
        check_close([x[0] for x in by_itself], [x[row] for x in together], ROUNDING)


@all_rules
def test_the_future_is_not_seen(rule):
    """By perturbation: whatever comes after a token, what was read up to it has the same bits."""
    layout = LAYOUTS["rest, whole chunks, begun"]
    arguments = make(rule, layout)
    y, _ = call(arguments, rule, layout)
    for t in range(1, layout.length):
        changed = [None if x is None else x.clone() for x in arguments[:-1]]
        for stream in tensors(changed):
            stream[:, :, t:] += torch.rand_like(stream[:, :, t:])
        other, _ = call([*changed, arguments[-1]], rule, layout)
        assert torch.equal(other[:, :, :t], y[:, :, :t])
        assert not torch.equal(other[:, :, t], y[:, :, t])


@all_rules
def test_jacobian_is_causal(rule):
    """∂y_t / ∂(k, v, gates)_s is nonzero for every s ≤ t and zero for every s > t; ∂y_t / ∂q_s only for s = t."""
    layout = LAYOUTS["rest, whole chunks, begun"]
    arguments = make(rule, layout, heads=1, d=2, d_v=2)
    names = [n for n, x in zip(("q", "k", "v", "theta", "eta", "alpha"), arguments) if x is not None]
    streams = [x[:1] for x in tensors(arguments[:-1])]
    state = replaced(arguments[-1], iter([x[:1] for x in tensors(arguments[-1])]))

    def read(*streams):
        return call([*replaced(arguments[:-1], iter(streams)), state], rule, layout)[0].sum((0, 1, 3))

    jacobians = torch.autograd.functional.jacobian(read, tuple(streams))
    for name, jacobian in zip(names, jacobians):
        reached = (
            jacobian.flatten(4).abs().sum((1, 2, 4)) if jacobian.dim() == 5 else jacobian.abs().sum((1, 2))
        )
        expected = torch.eye(layout.length) if name == "q" else torch.ones_like(reached).tril()
        assert torch.equal(reached > 0, expected > 0), name


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
