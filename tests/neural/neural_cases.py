"""What the tests of `NeuralMemory` share: configs, a memory of random parameters, tokens, and states in rows."""

import torch

from memlayers.neural import NeuralMemory, NeuralMemoryConfig

HIDDEN, CHUNK = 8, 4
CASES = [
    {"rule": "titans"},
    {"rule": "titans", "depth": 2, "expansion": 2},
    {"rule": "titans", "momentum": False},
    {"rule": "titans", "decay": False, "conv_kernel": 1, "n_persistent_tokens": 3},
    {"rule": "ttt", "initial_memory": "zero"},
    {"rule": "ttt", "depth": 2, "initial_memory": "zero"},
    {"rule": "delta", "heads": 1, "head_dim": 6},
    {"rule": "atlas", "window": 3},
    {"rule": "atlas", "depth": 2, "expansion": 1, "window": 6},
    {"rule": "decay", "gate": False},
]


def memory(dtype=torch.float64, seed=0, **fields):
    """A memory none of whose parameters is at a neutral value."""
    torch.manual_seed(seed)
    config = NeuralMemoryConfig(**{"heads": 2, "chunk_size": CHUNK, **fields})
    module = NeuralMemory(config, HIDDEN).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_same(a, b, **tolerance):
    """Two outputs, or two states field by field."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        for name in a:
            assert_same(a[name], b[name], msg=lambda text, n=name: f"{n}: {text}")
    else:
        torch.testing.assert_close(a, b, **{"rtol": 1e-10, "atol": 1e-11, **tolerance})


def rows(state, index):
    return {name: field[index] for name, field in state.items()}


def cat(*states):
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}
