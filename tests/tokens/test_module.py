"""`MemoryTokens` on its own: tensors in, tensors out, no Hugging Face model."""

import pytest
import torch

from memlayers import MemoryTokens, MemoryTokensConfig

WIDTH, N_TOKENS, ROWS = 16, 3, 2


def module(**fields):
    torch.manual_seed(0)
    return MemoryTokens(
        MemoryTokensConfig(n_tokens=N_TOKENS, segment_length=8, **fields), WIDTH, embedding_std=0.5
    )


def test_recurrent_memory_is_replaced_and_accumulated_memory_grows():
    hidden, active = torch.randn(ROWS, N_TOKENS, WIDTH), torch.tensor([True, False])
    recurrent = module(projection="none")
    state = recurrent.new_state(ROWS)
    new = recurrent.update(state, hidden, active)
    assert torch.equal(new["memory"][0], hidden[0]) and torch.equal(new["memory"][1], state["memory"][1])
    accumulating = module(mode="accumulate", projection="none")
    state = accumulating.new_state(ROWS)
    assert state["memory"].shape == (ROWS, 0, WIDTH) and state["length"].tolist() == [0, 0]
    once = accumulating.update(state, hidden, active)
    twice = accumulating.update(once, hidden + 1, torch.tensor([True, True]))
    assert twice["length"].tolist() == [2 * N_TOKENS, N_TOKENS]
    tokens, used = accumulating.read(twice)
    assert torch.equal(tokens[0], torch.cat([hidden[0], hidden[0] + 1]))
    assert torch.equal(tokens[1][used[1]], hidden[1] + 1) and used.sum(1).tolist() == [2 * N_TOKENS, N_TOKENS]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_norm_keeps_memory_at_the_size_of_an_embedding(scale):
    memory = module(projection="norm")
    written = memory.update(
        memory.new_state(1), scale * torch.randn(1, N_TOKENS, WIDTH), torch.tensor([True])
    )
    size = written["memory"].pow(2).mean(-1).sqrt()
    torch.testing.assert_close(size, memory.norm.weight.abs().mean().expand_as(size), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("projection", ["norm", "linear"])
def test_autocast_does_not_round_what_is_written(projection):
    memory, hidden = module(projection=projection), torch.randn(1, N_TOKENS, WIDTH).bfloat16()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    active = torch.tensor([True])
    expected = memory.update(memory.new_state(1), hidden, active)["memory"]
    with torch.autocast("cpu", torch.bfloat16):
        got = memory.update(memory.new_state(1), hidden, active)["memory"]
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert not torch.equal(got, got.bfloat16().float()), "rounded to bf16 on the way"


def test_which_parameters_each_variant_has():
    names = {n for n, _ in module(projection="none").named_parameters()}
    assert names == {"initial_memory"}
    names = {n for n, _ in module(write_input="learned", projection="linear").named_parameters()}
    assert names == {"initial_memory", "write_tokens", "norm.weight", "proj"}
    names = {n for n, _ in module(mode="accumulate").named_parameters()}
    assert names == {"write_tokens", "norm.weight"}
