"""`NeuralMemoryConfig`: what fits together, and errors that name the field."""

import typing

import pytest

from memlayers.config import ConfigError
from memlayers.neural import RULES, NeuralMemoryConfig

MAC = {"placement": "mac", "segment_length": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 0}, "chunk_size: .*greater than or equal to 1"),
        ({"heads": 0}, "heads"),
        ({"depth": 0}, "depth"),
        ({"conv_kernel": 0}, "conv_kernel"),
        ({"theta_max": 0.0}, "theta_max"),
        ({"rule": "titan"}, "rule: .*'titans', 'ttt'"),
        (
            {"rule": "delta", "depth": 2},
            "depth: 2 is more than rule 'delta' supports, 1; titans, ttt and atlas take 2",
        ),
        ({"rule": "decay", "depth": 2}, "depth: 2 is more than rule 'decay' supports"),
        ({"depth": 3}, "depth: 3 is more than rule 'titans' supports, 2$"),
        ({"window": 4}, "window: rule 'titans' takes the gradient of one token, 4 need rule 'atlas'"),
        ({"rule": "delta", "window": 2}, "window"),
        ({"rule": "atlas", "window": 0}, "window"),
        ({"placement": "mac"}, "segment_length: placement 'mac' reads in segments"),
        ({"placement": "mag", "segment_length": 8}, "segment_length: only for placement 'mac'"),
        ({"placement": "mal", "segment_length": 8}, "segment_length: only for placement 'mac'"),
        ({"bptt_segments": 2}, "bptt_segments: only for placement 'mac'"),
        ({"write_while_decoding": True}, "write_while_decoding: only for placement 'mac'"),
        ({**MAC, "sliding_window": 4}, "sliding_window: only for placements 'mag' and 'mal'"),
        ({"placement": "max"}, "placement"),
        ({"layers": []}, "layers"),
        ({"n_persistent_tokens": -1}, "n_persistent_tokens"),
        ({"chunk": 4}, "chunk: unknown field, did you mean 'chunk_size'"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        NeuralMemoryConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rule": "delta", "window": 1},
        {"rule": "atlas", "window": 4, "depth": 2},
        {"placement": "mal", "sliding_window": 16},
        {**MAC, "bptt_segments": 2, "write_while_decoding": True},
    ],
    ids=str,
)
def test_what_fits(fields):
    config = NeuralMemoryConfig(**fields)
    assert NeuralMemoryConfig(**config.model_dump()) == config


def test_a_rule_has_what_the_fields_leave_it():
    def parts(**fields):
        config = NeuralMemoryConfig(**fields)
        return config.has_momentum, config.has_decay, config.inner_window

    assert parts() == (True, True, 1)
    assert parts(momentum=False) == (False, True, 1)
    assert parts(decay=False) == (True, False, 1)
    assert parts(rule="ttt") == (False, False, 1)
    assert parts(rule="delta") == (False, True, 1)
    assert parts(rule="atlas") == (True, True, 16)
    assert parts(rule="atlas", window=1) == (True, True, 1)
    assert parts(rule="decay", decay=False) == (False, False, 1)


def test_steps_and_where_the_gates_start():
    def step(**fields):
        return NeuralMemoryConfig(**{"chunk_size": 8, **fields}).greatest_step

    assert step() == 1 / 8 and step(depth=2) == 1 / 32 and step(rule="atlas", window=2) == 1 / 16
    assert step(rule="delta") == 0.5 and step(rule="decay") == 1.0 and step(theta_max=0.3) == 0.3
    assert NeuralMemoryConfig(mimetic=True).start_biases["alpha"] < NeuralMemoryConfig().start_biases["alpha"]
    given = {"theta_bias": 0.5, "eta_bias": 1.5, "alpha_bias": -3.0}
    assert NeuralMemoryConfig(mimetic=True, depth=2, **given).start_biases == {
        "theta": 0.5,
        "eta": 1.5,
        "alpha": -3.0,
    }


def test_every_rule_can_be_named_and_has_a_code_of_its_own():
    assert set(typing.get_args(NeuralMemoryConfig.model_fields["rule"].annotation)) == set(RULES)
    assert len({rule.code for rule in RULES.values()}) == len(RULES)


def test_width_of_a_head():
    assert NeuralMemoryConfig(heads=4).width_of_head(64) == 16
    assert NeuralMemoryConfig(heads=3, head_dim=10).width_of_head(64) == 10
    with pytest.raises(ConfigError, match="heads: 3 do not divide the width 64"):
        NeuralMemoryConfig(heads=3).width_of_head(64)
