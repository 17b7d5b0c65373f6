"""Perplexity on unseen prose: the same tokens for every arm, equal to a loss computed by hand."""

import math

import pytest
import torch

import memlayers as ml
from memlayers.eval.runner import evaluate_model
from memlayers.eval.texts import ProseConfig, unseen_prose


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(
        " ".join(f"The {word} river runs {n} miles." for n in range(150) for word in ("old", "cold"))
    )
    return ProseConfig(file=str(path), windows=4, n_sequences=3)


def test_sequences_come_from_the_end_of_the_file(prose, tokenizer):
    sequences = unseen_prose(prose, tokenizer, window=8)
    assert sequences.shape == (3, 32)
    text = tokenizer.decode(sequences[0])
    assert "120" in text and " 3 " not in text


def test_short_text_and_missing_file(prose, tokenizer):
    with pytest.raises(ValueError, match="file: the last fifth"):
        unseen_prose(prose, tokenizer, window=4000)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        unseen_prose(ProseConfig(file="nowhere.txt"), tokenizer, window=8)


def cells_of(model, tokenizer, prose, **fields) -> dict[str, dict]:
    fields = {"prose": prose.model_dump(), "window": 8, "batch_size": 2, **fields}
    results = evaluate_model(model, tokenizer, "perplexity", **fields)
    return {
        cell["arm"]: cell for cell in results.report["tables"][0]["cells"] if cell["metric"] == "perplexity"
    }


def test_arms_equal_losses_by_hand(prose, tokenizer, tiny_llama):
    window, sequences = 8, unseen_prose(prose, tokenizer, window=8)
    tiny_llama.eval()
    with torch.no_grad():
        pieces = sequences.reshape(-1, window)
        cut = tiny_llama(pieces, labels=pieces).loss.item()
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=2, segment_length=window))
    cells = cells_of(tiny_llama, tokenizer, prose)
    assert cells["base_truncated"]["value"] == pytest.approx(math.exp(cut), rel=1e-5)
    assert cells["memory_disabled"]["value"] == cells["base_truncated"]["value"]
    with torch.no_grad():
        logits = tiny_llama(sequences).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none")
    inside = [t for t in range(31) if (t + 1) % window]
    assert cells["trained"]["value"] == pytest.approx(losses[:, inside].mean().exp().item(), rel=1e-5)
    assert cells["trained"]["low"] <= cells["trained"]["value"] <= cells["trained"]["high"]


def test_longer_than_the_positions_is_not_run(prose, tokenizer, tiny_llama):
    tiny_llama.config.max_position_embeddings = 16
    cells = cells_of(tiny_llama, tokenizer, prose)
    assert "value" in cells["base_truncated"]
    results = evaluate_model(tiny_llama, tokenizer, "perplexity", prose=prose.model_dump(), window=8)
    (reason,) = {r["not_run"] for r in results.records if r["arm"] == "base"}
    assert "16 positions" in reason
