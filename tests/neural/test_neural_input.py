"""What `NeuralMemory` refuses: wrong input, and states of another rule, shape or kind; and no rows at all."""

import itertools

import pytest
import torch

from memlayers.config import ConfigError
from memlayers.neural import RULES, NeuralMemory, NeuralMemoryConfig
from tests.neural.neural_cases import HIDDEN, assert_same, memory, tokens


def test_nan_names_the_row_and_nothing_is_computed(monkeypatch):
    module, x = memory(), tokens(3, 5)
    state = module.new_state(3)
    good, _ = module(x, state)
    bad = x.clone()
    bad[1, 2, 0], bad[2, 4, 1] = torch.nan, torch.inf
    with monkeypatch.context() as patch:
        patch.setattr(module.qkv_proj, "forward", lambda *_: pytest.fail("computed"))
        for call in (lambda: module(bad, state), lambda: module.read(bad, state)):
            with pytest.raises(ValueError, match=r"row 1 holds NaN .*token 2\), row 2 holds NaN .*token 4"):
                call()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1:] = False
    assert_same(module(bad, state, mask)[0][0], good[0])  # at pads it is nobody's business


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 0, HIDDEN), None, r"x has no tokens \(T = 0\)"),
        (torch.zeros(2, HIDDEN), None, r"x has shape \(2, 8\), this memory takes \(batch, T, 8\)"),
        (torch.zeros(2, 3, 5), None, r"x has shape \(2, 3, 5\)"),
        (torch.zeros(2, 3, HIDDEN), torch.ones(2, 3), "mask is a torch.float32 tensor"),
        (torch.zeros(2, 3, HIDDEN), torch.ones(2, 4, dtype=torch.bool), r"mask .* shape \(2, 4\)"),
    ],
)
def test_wrong_input_is_named(x, mask, message):
    with pytest.raises(ValueError, match=message):
        memory(torch.float32)(x, None, mask)


def test_no_rows_and_nothing_but_pads():
    module = memory(torch.float32)
    assert module(torch.zeros(0, 3, HIDDEN))[0].shape == (0, 3, HIDDEN)
    state = module(tokens(2, 5, dtype=torch.float32))[1]
    y, end = module(torch.zeros(2, 3, HIDDEN), state, torch.zeros(2, 3, dtype=torch.bool))
    assert not y.any() and all(torch.equal(end[name], state[name]) for name in state)


@pytest.mark.parametrize(("one", "other"), itertools.permutations(RULES, 2))
def test_a_state_of_another_rule_is_refused(one, other):
    state = memory(torch.float32, rule=one, window=None).new_state(2)
    with pytest.raises(ValueError, match=f"'facts'.*'rule' of the state says '{one}', .* rule '{other}'"):
        memory(torch.float32, rule=other).check_state(state, "facts")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 2}, r"lacks nothing and has \['anchor.1', 'momentum.1', 'weights.1'\] too much"),
        ({"momentum": False}, r"lacks \['momentum.0'\]"),
        ({"conv_kernel": 1}, r"lacks \['conv'\]"),
        ({"conv_kernel": 3}, r"field 'conv' .* shape \(1, 2, 24\), .* floats of shape \(1, 3, 24\)"),
        ({"heads": 4}, r"field 'weights.0' .* \(1, 4, 2, 2\), .* \(1, 2, 4, 4\)"),
        (
            {"chunk_size": 9},
            r"field 'position' of the state is \[7\], the chunks of this memory have 4 tokens",
        ),
    ],
)
def test_a_state_of_another_shape_is_refused(fields, message):
    state = memory(torch.float32, **fields)(tokens(1, 7, dtype=torch.float32))[1]
    module = memory(torch.float32)
    for call in (
        lambda: module.check_state(state, "facts"),
        lambda: module(tokens(1, 2, dtype=torch.float32), state),
        lambda: module.read(tokens(1, 2, dtype=torch.float32), state),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_broken_state_is_refused():
    module = memory(torch.float32)
    state = module.new_state(2)
    for field, value in (("position", state["position"].float()), ("weights.0", state["weights.0"].long())):
        with pytest.raises(ValueError, match=f"field '{field}'"):
            module.check_state({**state, field: value}, "facts")
    with pytest.raises(ValueError, match=r"field 'momentum\.0'"):
        module.check_state({**state, "momentum.0": state["momentum.0"][:1]}, "facts")
    with pytest.raises(ValueError, match="the state has 2 rows, x has 3"):
        module(tokens(3, 2, dtype=torch.float32), state)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(
        ConfigError, match="heads: 3 do not divide the width 8; take other heads or give head_dim"
    ):
        NeuralMemory(NeuralMemoryConfig(heads=3), HIDDEN)
    module = NeuralMemory(NeuralMemoryConfig(heads=3, head_dim=5), HIDDEN)
    assert module(torch.randn(1, 4, HIDDEN))[0].shape == (1, 4, HIDDEN)
