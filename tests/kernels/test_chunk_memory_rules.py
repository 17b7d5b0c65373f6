"""chunk_memory: what its rules should mean, and calls, rows and the future, of the reference and the closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from memlayers.kernels.chunk_memory import reference
from tests.kernels.chunk_memory_cases import (
    LAYOUTS,
    PATHS,
    ROUNDING,
    RULES,
    Layout,
    all_rules,
    call,
    check_close,
    make,
    replaced,
    tensors,
)
from tests.kernels.poisoned import poisoned  # noqa: F401

TITANS, DELTA = RULES["titans"], RULES["delta"]


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
