"""Where `NeuralMemory` starts: persistent tokens, its first weights and gates, which no text can make run away."""

import pytest
import torch

from memlayers.neural import NeuralMemory, NeuralMemoryConfig
from tests.neural.neural_cases import CASES, CHUNK, HIDDEN, assert_same, memory, tokens


def test_persistent_tokens_are_written_before_the_text():
    module = memory(n_persistent_tokens=6)
    plain = memory()
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if n != "persistent"})
    start = module.new_state(2)
    assert_same(start, plain(module.persistent.expand(2, -1, -1))[1])
    assert start["position"].tolist() == [2, 2]
    assert (start["weights.0"] - plain.new_state(2)["weights.0"]).abs().max() > 1e-3
    in_attention = memory(n_persistent_tokens=6, placement="mac", segment_length=4)
    assert in_attention.persistent is None and not in_attention.new_state(1)["position"].any()


def test_initial_memory():
    learned = memory()
    assert_same(learned.new_state(3)["weights.0"], learned.initial[0].expand(3, -1, -1, -1))
    zero = memory(initial_memory="zero")
    assert not len(zero.initial) and not zero.new_state(1)["weights.0"].any()
    assert not zero.read(tokens(1, 2), zero.new_state(1)).any(), "an empty memory says nothing"
    deep = memory(initial_memory="zero", depth=2)
    state = deep.new_state(1)
    assert len(deep.initial) == 1 and state["weights.0"].any() and not state["weights.1"].any()


def test_mimetic_start():
    torch.manual_seed(0)
    module = NeuralMemory(NeuralMemoryConfig(mimetic=True, heads=2), HIDDEN)
    q, k, v = module.qkv_proj.weight.chunk(3)
    assert torch.equal(q, k) and not torch.equal(q, v)
    q, k, v = module.conv.chunk(3, dim=1)
    assert torch.equal(q, k) and not torch.equal(q, v)
    x = tokens(1, 6, dtype=torch.float32)
    queries, keys, _, _ = module._streams(x, module.new_state(1), None)
    assert_same(queries, keys, rtol=1e-5, atol=1e-6)
    assert module._gates(x)[2].max() < 1e-3


def test_gates_start_where_the_config_says():
    torch.manual_seed(0)
    x = tokens(2, 50, dtype=torch.float32)
    module = NeuralMemory(
        NeuralMemoryConfig(theta_max=0.5, theta_bias=0.0, eta_bias=1.0, alpha_bias=-3.0), HIDDEN
    )
    for gate, expected in zip(module._gates(x), (0.25 * (1 - 0.731), 0.731, 0.0474)):
        assert gate.shape == (2, 4, 50) and abs(gate.mean() - expected) < 0.02 and gate.std() > 0
    alpha = NeuralMemory(NeuralMemoryConfig(rule="decay"), HIDDEN)._gates(x)[2]
    assert (alpha == alpha[:1, :, :1]).all() and alpha[0, :, 0].diff().min() > 0, "a constant a head, spread"


@pytest.mark.parametrize("text", ["one token", "bursts", "random"])
@pytest.mark.parametrize("fields", [*CASES, {"rule": "atlas", "window": 3, "momentum": False}], ids=str)
def test_no_text_makes_it_run_away_however_the_gates_stand(fields, text):
    """Gates anywhere between their ends, changing with every token, and no forgetting; bursts are as long as chunks."""
    module = memory(torch.float32, **fields)
    x = {
        "one token": tokens(1, 1, dtype=torch.float32).expand(1, 512, -1),
        "bursts": tokens(1, 512 // CHUNK, dtype=torch.float32).repeat_interleave(CHUNK, 1),
        "random": tokens(1, 512, dtype=torch.float32),
    }[text]
    with torch.no_grad():
        for gates in ("open", "wild"):
            module.gates.weight.copy_(torch.randn_like(module.gates.weight) * (1 if gates == "wild" else 0))
            for name, bias in zip(module.gate_names, module.gates.bias.view(-1, module.config.heads)):
                bias.fill_({"theta": 20.0, "eta": 2.0, "alpha": -20.0}[name] if gates == "open" else 0.0)
            y, state = module(x)
            assert torch.isfinite(y).all()
            assert state["weights.0"].norm() < 100
