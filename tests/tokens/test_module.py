"""`MemoryTokens` on its own: tensors in, tensors out, no Hugging Face model."""

import pytest
import torch

from memlayers import ConfigError, MemoryTokens, MemoryTokensConfig

WIDTH, N_TOKENS, ROWS = 16, 3, 2


def module(**fields):
    torch.manual_seed(0)
    return MemoryTokens(
        MemoryTokensConfig(n_tokens=N_TOKENS, segment_length=8, **fields), WIDTH, embedding_std=0.5
    )


def test_recurrent_memory_is_replaced_and_accumulated_memory_grows():
    hidden, active = torch.randn(ROWS, N_TOKENS, WIDTH), torch.tensor([[True], [False]])
    recurrent = module(projection="none")
    state = recurrent.new_state(ROWS)
    _, used = recurrent.read_inputs(state)
    assert not used.any()  # nothing was written yet
    new = recurrent.update(state, hidden, None, active)
    assert new["length"].tolist() == [N_TOKENS, 0]
    assert torch.equal(new["memory"][0], hidden[0]) and torch.equal(new["memory"][1], state["memory"][1])
    accumulating = module(mode="accumulate", projection="none")
    state = accumulating.new_state(ROWS)
    assert state["memory"].shape == (ROWS, 0, WIDTH) and state["length"].tolist() == [0, 0]
    once = accumulating.update(state, hidden, None, active)
    twice = accumulating.update(once, hidden + 1, None, torch.tensor([[True], [True]]))
    assert twice["length"].tolist() == [2 * N_TOKENS, N_TOKENS]
    tokens, used = accumulating.read_inputs(twice)
    assert torch.equal(tokens[0], torch.cat([hidden[0], hidden[0] + 1]))
    assert torch.equal(tokens[1][used[1]], hidden[1] + 1) and used.sum(1).tolist() == [2 * N_TOKENS, N_TOKENS]


def test_a_prefix_is_made_by_an_lstm():
    """Against torch's own LSTM over the last hidden states of three segments; a row that had none keeps all."""
    memory, steps = (
        module(mode="prefix", projection="none", writer_dim=5).double(),
        torch.randn(3, ROWS, 1, WIDTH),
    )
    writer, state = memory.writer, memory.new_state(ROWS)
    assert memory.write_inputs(state) is None and memory.n_extra_tokens == N_TOKENS
    assert not hasattr(memory, "initial_memory") and state["length"].tolist() == [0] * ROWS
    torch.nn.init.normal_(writer.norm.weight, mean=1.0)
    lstm = torch.nn.LSTM(5, 5)
    for name, parameter in writer.lstm.named_parameters():
        getattr(lstm, f"{name}_l0").data.copy_(parameter)
    normed = torch.nn.functional.rms_norm(steps[:, :, 0], (WIDTH,), writer.norm.weight.float(), 1e-6)
    outputs, _ = lstm(torch.nn.functional.gelu(writer.mlp.float()(normed)))
    prefixes = writer.out.float()(outputs).view(3, ROWS, N_TOKENS, WIDTH)
    for step, hidden in enumerate(steps):
        state = memory.update(state, hidden, None, torch.tensor([[True], [step == 0]]))
        torch.testing.assert_close(state["memory"][0], prefixes[step, 0])  # float32 throughout
        torch.testing.assert_close(state["memory"][1], prefixes[0, 1])


def test_fields_that_do_not_go_together():
    for fields, told in [
        ({"writer_dim": 4}, "writer_dim: mode 'recurrent' has no recurrent network"),
        ({"mode": "prefix", "write_input": "learned"}, "write_input: mode 'prefix' has no tokens that write"),
    ]:
        with pytest.raises(ConfigError, match=told):
            MemoryTokensConfig(**fields)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_norm_keeps_memory_at_the_size_of_an_embedding(scale):
    memory = module(projection="norm")
    written = memory.update(
        memory.new_state(1), scale * torch.randn(1, N_TOKENS, WIDTH), None, torch.tensor([[True]])
    )
    size = written["memory"].pow(2).mean(-1).sqrt()
    torch.testing.assert_close(size, memory.norm.weight.abs().mean().expand_as(size), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("projection", ["norm", "linear"])
def test_autocast_does_not_round_what_is_written(projection):
    memory, hidden = module(projection=projection), torch.randn(1, N_TOKENS, WIDTH).bfloat16()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    active = torch.tensor([[True]])
    expected = memory.update(memory.new_state(1), hidden, None, active)["memory"]
    with torch.autocast("cpu", torch.bfloat16):
        got = memory.update(memory.new_state(1), hidden, None, active)["memory"]
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert not torch.equal(got, got.bfloat16().float()), "rounded to bf16 on the way"


def test_which_parameters_each_variant_has():
    names = {n for n, _ in module(projection="none").named_parameters()}
    assert names == {"initial_memory"}
    names = {n for n, _ in module(write_input="learned", projection="linear").named_parameters()}
    assert names == {"write_tokens", "norm.weight", "proj"}
    names = {n for n, _ in module(mode="accumulate").named_parameters()}
    assert names == {"write_tokens", "norm.weight"}
