"""`NeuralMemory` on its own: tokens written once wherever calls and pads fall, its state, precision, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memlayers.core.state import MemoryState
from memlayers.neural import NeuralMemory, NeuralMemoryConfig
from memlayers.neural.streams import streams
from tests.neural.neural_cases import CASES, CHUNK, HIDDEN, assert_same, cat, memory, rows, tokens


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_calls_may_be_split_anywhere(fields):
    module, x = memory(**fields), tokens(2, 11)
    whole, end = module(x)
    assert whole.shape == x.shape and whole.any()
    for parts in [[1] * 11, *([n, 11 - n] for n in range(1, 11))]:
        state, outputs = None, []
        for part in x.split(parts, dim=1):
            y, state = module(part, state)
            outputs.append(y)
        assert_same(torch.cat(outputs, 1), whole)
        assert_same(state, end)
    assert end["position"].tolist() == [(11 + module.config.n_persistent_tokens) % CHUNK] * 2


def test_gradients_go_through_the_state_of_a_split():
    module, x = memory(), tokens(1, 9).requires_grad_()
    inputs = [x, *module.parameters()]
    whole = torch.autograd.grad(module(x)[0].square().sum(), inputs)
    first, state = module(x[:, :6])
    second, _ = module(x[:, 6:], state)
    for a, b in zip(torch.autograd.grad((torch.cat([first, second], 1).square().sum()), inputs), whole):
        assert_same(a, b)


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10, [0] * 9 + [1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1] * 10, [1] * 4 + [0] * 6],
    "scattered": [
        [1, 0, 1, 1, 0, 0, 1, 0, 1, 1],
        [0, 1, 1, 1, 0, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
    ],
    "all pads": [[0] * 10, [1, 1, 0] + [1] * 7, [0] * 10],
    "none": [[1] * 10] * 3,
    "inside one chunk": [[0] * 9 + [1], [0] * 6 + [1] + [0] * 3, [0] * 8 + [1] * 2],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_pads_change_nothing_wherever_rows_stand(fields, kind):
    """Fresh rows, and rows that go on from 0, 3 and 6 earlier tokens, so from three places of a chunk."""
    module, x, mask = memory(**fields), tokens(3, 10), torch.tensor(MASKS[kind], dtype=torch.bool)
    pads = torch.where(mask[..., None], x, torch.nan)
    earlier = [module.new_state(1), module(tokens(1, 3, seed=2))[1], module(tokens(1, 6, seed=3))[1]]
    for state in (module.new_state(3), cat(*earlier)):
        y, end = module(pads, state, mask)
        assert not y[~mask].any()
        for row, real in enumerate(mask):
            one = slice(row, row + 1)
            if not real.any():
                assert all(torch.equal(end[name][row], state[name][row]) for name in state)
                continue
            alone, alone_end = module(x[one, real], rows(state, one))
            assert_same(y[one, real], alone)
            assert_same(rows(end, one), alone_end)


@pytest.mark.parametrize("kernel", [0, 2, 4])
def test_streams_equal_their_formula_with_gradients(kernel, monkeypatch):
    monkeypatch.setattr("memlayers.neural.streams.BLOCK", 16)  # two blocks
    x = torch.randn(2, 10, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kernel, 12, dtype=torch.float64, requires_grad=True) if kernel else None
    tail = torch.randn(2, kernel - 1, 12, dtype=torch.float64, requires_grad=True) if kernel else None
    q, k, v, new_tail = streams(x, 2, weight, tail, None)
    convolved = x
    if kernel:
        inputs = torch.cat([tail, x], 1)
        assert torch.equal(new_tail, inputs[:, -kernel + 1 :])
        convolved = F.conv1d(inputs.mT, weight.T[:, None], groups=12).mT
    for got, expected in zip((q, k, v), F.silu(convolved).chunk(3, -1)):
        expected = expected.unflatten(-1, (2, 2)).transpose(1, 2)
        if got is not v:
            expected = expected / (expected.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        assert_same(got, expected)
    inputs = [tensor for tensor in (x, weight, tail) if tensor is not None]
    assert torch.autograd.gradcheck(
        lambda x, weight=None, tail=None: streams(x, 2, weight, tail, None)[:3], inputs
    )


def test_rows_at_different_places_decode_one_column_at_a_time(monkeypatch):
    from memlayers.neural import module as source

    widths = []
    run = source.chunk_memory
    monkeypatch.setattr(
        source,
        "chunk_memory",
        lambda q, *rest, **named: (widths.append(q.shape[2]), run(q, *rest, **named))[1],
    )
    module = memory()
    state = cat(module(tokens(1, 3))[1], module(tokens(1, 5))[1])
    widths.clear()
    for step in range(CHUNK + 1):
        _, state = module(tokens(2, 1, seed=step), state)
    assert widths == [1] * (CHUNK + 1) and state["position"].tolist() == [0, 2]


def test_gradients_at_pads_are_zero_and_the_others_as_without():
    module, x = memory(), tokens(1, 7).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    (padded,) = torch.autograd.grad(module(x, None, mask)[0].square().sum(), x)
    (plain,) = torch.autograd.grad(module(x[:, mask[0]])[0].square().sum(), x)
    assert not padded[~mask].any()
    assert_same(padded, plain)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_future_and_other_rows_do_not_reach_a_token(fields):
    """By the Jacobian: each token is reached by the tokens up to it in its row, by all of them, and by no others."""
    module = memory(**fields)
    reach = torch.autograd.functional.jacobian(lambda x: module(x)[0].sum(-1), tokens(2, 6)).abs().sum(-1) > 0
    expected = torch.zeros(2, 6, 2, 6, dtype=torch.bool)
    for row in range(2):
        expected[row, :, row] = torch.ones(6, 6).tril().bool()
    assert torch.equal(reach, expected)


@pytest.mark.parametrize("fields", [CASES[0], CASES[8]], ids=str)
def test_a_change_is_felt_from_its_token_on(fields):
    module, x = memory(**fields), tokens(2, 9)
    changed = x.clone()
    changed[1, 5] += 1
    moved = (module(changed)[0] - module(x)[0]).abs().amax(-1) > 1e-12
    assert moved.tolist() == [[False] * 9, [False] * 5 + [True] * 4]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_state_is_never_changed(fields):
    module = memory(**fields)
    for length in (3, CHUNK, 2 * CHUNK):
        state = {name: field.detach() for name, field in module(tokens(2, length))[1].items()}
        before = {name: field.clone() for name, field in state.items()}
        for mask in (None, torch.tensor([[True] * 6, [False] * 6])):
            module(tokens(2, 6), state, mask)[0].sum().backward()
            module.read(tokens(2, 6), state)
            assert all(torch.equal(before[name], state[name]) for name in state)


@pytest.mark.parametrize("fields", [{}, {"heads": 1}, {"rule": "atlas", "depth": 2, "window": 3}], ids=str)
def test_a_state_can_be_saved_at_every_place_and_is_no_part_of_the_module(fields, tmp_path):
    module = memory(**fields)
    with torch.no_grad():
        for state in (module.new_state(1), *(module(tokens(1, n))[1] for n in (1, CHUNK, CHUNK + 1))):
            MemoryState({"past": state}).save(tmp_path / "state")
            loaded = MemoryState.load(tmp_path / "state")["past"]
            assert all(torch.equal(loaded[name], state[name]) for name in state)
            storages = {field.untyped_storage().data_ptr() for field in state.values()}
            assert not storages & {
                parameter.untyped_storage().data_ptr() for parameter in module.parameters()
            }


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_read_asks_the_memory_as_it_stands(fields):
    module, x = memory(**fields), tokens(2, 5)
    state = module(tokens(2, 6))[1]
    query = F.silu(x @ module.qkv_proj.weight.chunk(3)[0].T).unflatten(-1, (module.config.heads, -1))
    query = query / (query.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    y = torch.einsum("bthd,bhde->bthe", query, state["weights.0"])
    if module.config.depth == 2:
        y = torch.einsum("bthd,bhde->bthe", F.gelu(y), state["weights.1"])
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm_scale).flatten(-2)
    if module.config.gate:
        y = y * F.silu(module.out_gate(x))
    assert_same(module.read(x, state), module.out_proj(y))


def test_without_convolution_and_forgetting_a_token_reads_what_read_reads():
    module, x = memory(rule="ttt", conv_kernel=1), tokens(2, 5)
    y, state = module(x)
    assert_same(module.read(x, state)[:, -1], y[:, -1])


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_gradients_reach_every_parameter(fields):
    torch.manual_seed(0)
    module = NeuralMemory(NeuralMemoryConfig(**{"heads": 2, "chunk_size": CHUNK, **fields}), HIDDEN)
    y, _ = module(tokens(2, 9, dtype=torch.float32))
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_an_optimizer_step_and_a_state_dict_with_several_heads(fields):
    module, x = memory(torch.float32, **fields), tokens(3, 9, dtype=torch.float32)
    target = tokens(3, 9, dtype=torch.float32, seed=5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = (module(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    other = NeuralMemory(module.config, HIDDEN)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_low_precision_keeps_a_float32_state(fields):
    module, x = memory(torch.float32, **fields), tokens(2, 11, dtype=torch.float32)
    expected, _ = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, state = module(x)
    low = memory(torch.float32, **fields).to(torch.bfloat16)
    for y, end in ((autocast, state), low(x.to(torch.bfloat16))):
        floats = [field for field in end.values() if field.is_floating_point()]
        assert all(field.dtype == torch.float32 and torch.isfinite(field).all() for field in floats)
        assert torch.isfinite(y).all() and (y.float() - expected).norm() < 0.1 * expected.norm()
    assert low(x.to(torch.bfloat16))[0].dtype == torch.bfloat16 and autocast.dtype == torch.float32
    assert low.read(x.to(torch.bfloat16), end).dtype == torch.bfloat16


def test_bfloat16_splits_like_float32():
    module, x = memory(torch.float32).to(torch.bfloat16), tokens(1, 8, dtype=torch.bfloat16)
    whole, end = module(x)
    first, state = module(x[:, :3])
    second, state = module(x[:, 3:], state)
    assert_same(torch.cat([first, second], 1), whole, rtol=2e-2, atol=2e-2)
    assert torch.equal(state["conv"], end["conv"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fields", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_checkpointing_gives_the_same_gradients(fields, reentrant):
    module, x = memory(**fields), tokens(2, 9).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = False
    names = list(module.new_state(1))

    def run(x, *state):
        y, end = module(x, dict(zip(names, state)), mask)
        return y, *end.values()

    inputs, gradients = [x, *module.parameters()], []
    for wrap in (lambda *a: run(*a), lambda *a: checkpoint(run, *a, use_reentrant=reentrant)):
        module.zero_grad()
        x.grad = None
        y, *state = wrap(x, *module.new_state(2).values())
        sum(part.square().sum() for part in (y, *state) if part.requires_grad).backward()
        gradients.append([tensor.grad for tensor in inputs])
    for a, b in zip(*gradients):
        assert_same(a, b)
