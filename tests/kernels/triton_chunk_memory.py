"""The Triton path of chunk_memory; run by test_chunk_memory_triton.py in the interpreter, and on a GPU.

Small sizes in the interpreter, which is slow, and the sizes in use on a GPU.
"""

import pytest
import torch

from memlayers.kernels.chunk_memory import ChunkState, closed, reference, triton
from memlayers.kernels.paths import interpreted
from tests.kernels.interpreted import DEVICE

# gradient, momentum, decay, chunk_size, first, T, active columns of the two rows (None: all)
CASES = {
    "titans": ("chunk", True, True, 16, 16, 40, None),
    "one chunk, not full": ("chunk", True, True, 16, 16, 5, None),
    "open chunk": ("chunk", True, True, 16, 3, 35, None),
    "up to the end of a chunk": ("chunk", True, True, 16, 4, 20, None),
    "ragged rows": ("chunk", True, True, 16, 16, 40, [(7, 33), (0, 16)]),
    "a row without tokens": ("chunk", True, True, 16, 12, 30, [(0, 0), (2, 30)]),
    "no momentum": ("chunk", False, True, 16, 16, 33, None),
    "ttt": ("chunk", False, False, 16, 9, 26, None),
    "no decay": ("chunk", True, False, 16, 16, 24, [(3, 24), (0, 20)]),
    "odd chunks": ("chunk", True, True, 5, 2, 17, [(1, 17), (0, 12)]),
    "chunks of one token": ("chunk", True, True, 1, 1, 3, None),
    "large chunks": ("chunk", True, True, 36, 20, 40, None),
    "Hebbian": ("none", False, True, 16, 5, 37, [(2, 37), (0, 30)]),
    "delta": ("token", False, True, 16, 5, 37, [(2, 37), (0, 30)]),
    "delta, no decay": ("token", False, False, 16, 16, 18, None),
}
# Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest.
ROUNDINGS = {
    torch.float32: 0.0,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if interpreted() else 2.0**-8,
}


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(interpreted())
    yield
    torch.use_deterministic_algorithms(False)


def make(case, dtype=torch.float32, b=2, h=1, d=16, d_v=16, hidden=None):
    """Arguments of chunk_memory: streams of `dtype`, the rest float32. hidden: of two layers; None: one layer."""
    gradient, momentum, decay, chunk_size, first, t, spans = CASES[case]
    generator = torch.Generator().manual_seed(len(case))

    def draw(*shape, uniform=False):
        sample = torch.rand if uniform else torch.randn
        return sample(*shape, generator=generator).to(DEVICE)

    q, k = (torch.nn.functional.normalize(draw(b, h, t, d), dim=-1).to(dtype) for _ in range(2))
    v = draw(b, h, t, d_v).to(dtype)
    theta, eta, alpha = (scale * draw(b, h, t, uniform=True) for scale in (0.1, 1.0, 0.2))
    widths = [(d, d_v)] if hidden is None else [(d, hidden), (hidden, d_v)]
    size = 1 if hidden is None else 0.3  # two layers at whose memories such steps do not explode
    memories = [tuple(size * draw(b, h, *width) for width in widths) for _ in range(3)]
    state = ChunkState(
        memories[0], memories[1] if momentum else (), memories[2] if gradient == "chunk" else ()
    )
    active = None
    if spans is not None:
        active = torch.zeros(b, t, dtype=torch.bool, device=DEVICE)
        for row, (start, stop) in zip(active, spans):
            row[start:stop] = True
    gates = theta, eta if momentum else None, alpha if decay else None
    return [q, k, v, *gates, state], (chunk_size, first, active, gradient, 1)


def map_tensors(arguments, function):
    """`function` of every tensor among the arguments, in a ChunkState too."""
    *tensors, state = arguments
    state = ChunkState(*(tuple(map(function, part)) for part in state))
    return [None if x is None else function(x) for x in tensors] + [state]


def tensors_of(arguments):
    *tensors, state = arguments
    return [x for x in (*tensors, *(x for part in state for x in part)) if x is not None]


def run(path, arguments, options):
    """y, the tensors of the new state, and the gradients of all inputs for fixed gradients, exact in every dtype."""
    arguments = map_tensors(arguments, lambda x: x.detach().clone().requires_grad_())
    y, state = path.chunk_memory(*arguments, *options)
    out = tensors_of([y, state])
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in out]
    inputs = tensors_of(arguments)
    grads = torch.autograd.grad(out, inputs, grads, allow_unused=True)
    return out, [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads)]


def check_parity(arguments, options):
    out, grads = run(triton, arguments, options)
    exact_out, exact_grads = run(reference, map_tensors(arguments, torch.Tensor.double), options)
    assert [x.dtype for x in grads] == [x.dtype for x in tensors_of(arguments)]
    two_layers = len(arguments[-1].weights) == 2  # what one layer rounds off goes through the other
    for actual, exact in zip(out + grads, exact_out + exact_grads):
        check_equal(actual, exact, 3e-6 if two_layers else 1e-6)


def check_equal(actual, exact, tolerance=1e-6):
    """Within the rounding of the dtype and `tolerance` of the largest element."""
    error = (actual.double() - exact).abs()
    limit = ROUNDINGS[actual.dtype] * exact.abs() + tolerance * exact.abs().max()
    assert actual.shape == exact.shape
    assert (error <= limit).all(), f"error {error.max():.2e}, largest element {exact.abs().max():.2e}"


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    check_parity(*make(case))


@pytest.mark.parametrize(
    "case, hidden",
    [
        ("up to the end of a chunk", 40),
        ("a row without tokens", 16),
        ("ttt", 16),
        ("odd chunks", 7),
        ("chunks of one token", 1),
    ],
)
def test_two_layers(case, hidden):
    check_parity(*make(case, hidden=hidden))


def test_two_layers_of_several_tiles():
    """Every width and the chunks are more than a tile of the kernels."""
    check_parity(*make("large chunks", b=1, d=33, d_v=35, hidden=34))


def test_two_layers_in_half_precision():
    check_parity(*make("odd chunks", torch.bfloat16, d=6, d_v=5, hidden=9))


@pytest.mark.parametrize(
    "case, dtype",
    [
        ("ragged rows", torch.bfloat16),
        ("ttt", torch.float16),
        ("Hebbian", torch.bfloat16),
        ("delta", torch.float16),
    ],
)
def test_half_precision(case, dtype):
    check_parity(*make(case, dtype))


@pytest.mark.parametrize("case, d, d_v", [("open chunk", 33, 17), ("delta", 6, 40), ("delta", 1, 1)])
def test_widths(case, d, d_v):
    check_parity(*make(case, b=2, d=d, d_v=d_v))


@pytest.mark.parametrize("case", ["ragged rows", "Hebbian", "delta"])
def test_gates_at_their_limits(case):
    """Steps of 0, momentum of 0 and 1, decay of 0 and 1."""
    arguments, options = make(case)
    for i, every in ((3, 2), (4, 3), (5, 4)):
        if arguments[i] is not None:
            arguments[i][:, :, ::every] = 0
    for i, every in ((4, 5), (5, 6)):
        if arguments[i] is not None:
            arguments[i][:, :, 1::every] = 1
    check_parity(arguments, options)


@pytest.mark.parametrize("case, hidden", [("a row without tokens", None), ("odd chunks", 4), ("delta", None)])
def test_inactive_tokens_change_nothing(case, hidden):
    """Whatever stands there: y is 0, and the state of a row without active tokens is what it was, bit by bit."""
    arguments, (chunk_size, first, active, *rest) = make(case, hidden=hidden)
    active = active.clone()
    active[0] = False
    for x in arguments[:3]:
        x[~active[:, None].expand(x.shape[:3])] = torch.nan
    y, state = triton.chunk_memory(*arguments, chunk_size, first, active, *rest)
    assert (y[~active[:, None].expand(y.shape[:3])] == 0).all()
    for new, old in zip(tensors_of([state]), tensors_of(arguments[-1:])):
        assert torch.equal(new[0], old[0])
        assert new.isfinite().all()


def test_state_is_not_changed_in_place():
    arguments, options = make("titans")
    before = [x.clone() for x in tensors_of(arguments)]
    run(triton, arguments, options)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(arguments)))


@pytest.mark.parametrize(
    "case, hidden", [("titans", None), ("up to the end of a chunk", 8), ("Hebbian", None), ("delta", None)]
)
def test_split_over_calls(case, hidden):
    """One call, or two with the state in between, the second in the middle of a chunk."""
    arguments, (chunk_size, first, _, *rest) = make(case, hidden=hidden)
    *streams, state = arguments
    whole, end = triton.chunk_memory(*streams, state, chunk_size, first, None, *rest)
    cut = first + 7
    parts = []
    for columns, left in ((slice(0, cut), first), (slice(cut, None), chunk_size - 7)):
        piece = [None if x is None else x[:, :, columns] for x in streams]
        y, state = triton.chunk_memory(*piece, state, chunk_size, left, None, *rest)
        parts.append(y)
    check_equal(torch.cat(parts, 2), whole.double())
    for a, b in zip(tensors_of([state]), tensors_of([end])):
        check_equal(a, b.double())


def test_streams_that_are_not_contiguous():
    arguments, options = make("open chunk", b=2, h=2)
    arguments = map_tensors(arguments, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    check_parity(arguments, options)


@pytest.mark.parametrize("hidden", [None, 8 if interpreted() else 256])
def test_backward_is_bit_equal(hidden):
    size = {"d": 4, "d_v": 4} if interpreted() else {"b": 16, "h": 8, "d": 64, "d_v": 64}
    arguments, options = make("odd chunks", hidden=hidden, **size)
    first = run(triton, arguments, options)
    for _ in range(1 if interpreted() else 20):
        for a, b in zip(first, run(triton, arguments, options)):
            assert all(map(torch.equal, a, b))


def test_differentiable_once():
    arguments, options = make("one chunk, not full")
    arguments[0].requires_grad_()
    y, _ = triton.chunk_memory(*arguments, *options)
    (grad,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("what", ["window", "large chunk", "float64"])
def test_what_takes_the_closed_form(what):
    arguments, (chunk_size, first, active, gradient, window) = make("titans")
    if what == "window":
        window = 3
        halo = tuple(torch.randn(2, 1, 2, 16, device=DEVICE) for _ in "kv")
        arguments[-1] = arguments[-1]._replace(halo=halo)
    elif what == "float64":
        arguments = map_tensors(arguments, torch.Tensor.double)
    else:
        chunk_size = first = triton.LARGEST_CHUNK + 1
    options = chunk_size, first, active, gradient, window
    for ours, theirs in zip(run(triton, arguments, options), run(closed, arguments, options)):
        assert all(map(torch.equal, ours, theirs))


if not interpreted():

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("gradient", ["chunk", "none", "token"])
    @pytest.mark.parametrize("d, chunk_size", [(64, 64), (128, 64), (256, 16)])
    def test_sizes_in_use(gradient, d, chunk_size, dtype, monkeypatch):
        momentum = gradient == "chunk"
        monkeypatch.setitem(CASES, "large", (gradient, momentum, True, chunk_size, 7, 3 * 64, None))
        arguments, options = make("large", dtype, b=4, h=4, d=d, d_v=d)
        arguments[3] *= 0.1
        check_parity(arguments, options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("d, hidden, chunk_size", [(64, 256, 64), (64, 64, 64), (32, 128, 16)])
    def test_two_layers_of_sizes_in_use(d, hidden, chunk_size, dtype, monkeypatch):
        monkeypatch.setitem(CASES, "large", ("chunk", True, True, chunk_size, 7, 3 * 64, None))
        arguments, options = make("large", dtype, b=4, h=4, d=d, d_v=d, hidden=hidden)
        arguments[3] *= 0.1
        arguments[-1] = map_tensors(arguments[-1:], lambda x: 0.3 * x)[-1]
        check_parity(arguments, options)
