"""Perplexity on unseen prose: the same tokens for every arm, equal to a loss computed by hand."""

import math

import pytest
import torch

import memlayers as ml
from memlayers.eval.perplexity import PerplexityConfig, measure, unseen_prose


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(
        " ".join(f"The {word} river runs {n} miles." for n in range(150) for word in ("old", "cold"))
    )
    return PerplexityConfig(file=str(path), windows=4, n_sequences=3)


def test_sequences_come_from_the_end_of_the_file(prose, tokenizer):
    sequences = unseen_prose(prose, tokenizer, window=8)
    assert sequences.shape == (3, 32)
    text = tokenizer.decode(sequences[0])
    assert "120" in text and " 3 " not in text


def test_short_text_and_missing_file(prose, tokenizer):
    with pytest.raises(ValueError, match=r"perplexity\.file"):
        unseen_prose(prose, tokenizer, window=4000)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        unseen_prose(PerplexityConfig(file="nowhere.txt"), tokenizer, window=8)


def test_arms_equal_losses_by_hand(prose, tokenizer, tiny_llama):
    window, sequences = 8, unseen_prose(prose, tokenizer, window=8)
    tiny_llama.eval()
    base = measure(tiny_llama, "base", sequences, window, 2, 0, lambda n: None)
    with torch.no_grad():
        pieces = sequences.reshape(-1, window)
        cut = tiny_llama(pieces, labels=pieces).loss.item()
    assert base["base_cut"]["perplexity"] == pytest.approx(math.exp(cut), rel=1e-5)
    assert base["base"]["tokens"] == base["base_cut"]["tokens"] == 3 * 4 * 7

    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=2, segment_length=window))
    wrapped = measure(tiny_llama, "trained", sequences, window, 2, 0, lambda n: None)
    assert wrapped["memory_off"] == base["base_cut"]
    logits = tiny_llama(sequences).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none")
    inside = [t for t in range(31) if (t + 1) % window]
    assert wrapped["trained"]["perplexity"] == pytest.approx(losses[:, inside].mean().exp().item(), rel=1e-5)


def test_longer_than_the_positions_is_not_run(prose, tokenizer, tiny_llama):
    tiny_llama.config.max_position_embeddings = 16
    cells = measure(tiny_llama, "base", unseen_prose(prose, tokenizer, 8), 8, 2, 0, lambda n: None)
    assert "16 positions" in cells["base"]["not_run"]
    assert "perplexity" in cells["base_cut"]
