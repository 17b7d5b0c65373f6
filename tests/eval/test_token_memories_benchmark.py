"""The benchmark of token memories: the peers do the same work, the command writes all of it."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import memlayers as ml
from memlayers.cli import app
from memlayers.eval.speed import authors_rmt
from memlayers.eval.speed import token_memories as bench
from memlayers.eval.speed.lora import VOCAB, random_base, random_ids

SMALL = {"width": 32, "layers": 2, "rows": 2, "length": 24}
ASKED = {"asked": 4, "new_tokens": 3}
CLONE = os.environ.get("MEMLAYERS_ARMT")
authors = pytest.mark.skipif(
    CLONE is None,
    reason="MEMLAYERS_ARMT names no clone of github.com/RodkinIvan/associative-recurrent-memory-transformer",
)


def base(**config):
    return random_base(32, 2, "cpu", **config)


def test_peft_prefix_tuning_has_the_same_logits_and_answers():
    models, ids = bench.cartridges(base(), n_tokens=5), random_ids(2, 12, "cpu")
    ours, theirs = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with ml.disabled(models[0]):
        assert (models[0](input_ids=ids).logits - ours).abs().max() > 1e-3
    arms = bench.beside_peft(models, ids, ids[:, :4], new_tokens=5)
    assert torch.equal(arms["generate: memlayers"](), arms["generate: PEFT"]())
    assert arms["generate: PEFT"]().shape == (2, 9)


def test_peft_trainable_tokens_have_the_same_logits_gradients_and_answers():
    models = bench.task_tokens(base(tie_word_embeddings=True), n_names=3)
    ids = random_ids(2, 12, "cpu")
    ids[:, 5] = VOCAB + torch.tensor([2, 0])
    ours, theirs = (model(input_ids=ids, labels=ids) for model in models)
    assert ours.logits.shape[-1] == VOCAB + 3
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    (ours.loss + theirs.loss).backward()
    (learned,) = (p for p in models[1].parameters() if p.requires_grad)
    rows = ml.memories(models[0])["task_tokens"].rows.input.values()
    torch.testing.assert_close(torch.stack([row.grad for row in rows]), learned.grad, atol=1e-6, rtol=1e-4)
    assert learned.grad.abs().max() > 1e-3
    arms = bench.beside_peft(models, ids, ids[:, :6], new_tokens=5)
    assert torch.equal(arms["generate: memlayers"](), arms["generate: PEFT"]())


@authors
def test_the_authors_rmt_has_the_same_logits_and_gradients():
    """Through three segments; in float32 memory passes through every layer of each."""
    models, ids = bench.recurrent(Path(CLONE), base(), 3, segment_length=8), random_ids(2, 20, "cpu")
    outputs = [model(input_ids=ids, labels=ids) for model in models]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-4)
    for output in outputs:
        output.loss.backward()
    ours = ml.memories(models[0])["tokens"].initial_memory.grad
    torch.testing.assert_close(ours, models[1].memory_cell.memory.grad, atol=1e-6, rtol=1e-3)
    assert ours.abs().max() > 1e-5


@authors
def test_the_authors_armt_reads_what_it_wrote():
    """Ours and theirs are the base in the first segment; behind it, what both have written shows."""
    models, ids = bench.associative(Path(CLONE), base(), 3, 8, key_dim=4), random_ids(2, 20, "cpu")
    with torch.no_grad():
        for layer in models[1].memory_cell.layers:
            layer.W_mv.weight.normal_(std=0.2)
        for layer in ml.memories(models[0])["associative"].layers.values():
            layer.value.weight.normal_(std=0.2)
        plain = torch.cat([base()(input_ids=part).logits for part in ids.split(8, dim=1)], dim=1)
        for model in models:
            apart = (model(input_ids=ids).logits - plain).abs().amax(dim=(0, 2))
            assert apart[:8].max() < 1e-5 and apart[8:].min() > 1e-4
    train = [bench.train(model, ids) for model in models]
    assert all(step().isfinite() for step in train)


@authors
def test_streams_are_compared():
    parts = bench.compare_streams(Path(CLONE), 1, "cpu", **SMALL, n_tokens=2, segment_length=8, key_dim=4)
    assert list(parts) == ["recurrent tokens", "associative"]
    for part in parts.values():
        assert set(part["times ours"]) == {"train: the authors'", "read: the authors'"}


def test_another_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="give a clone of github"):
        authors_rmt.rmt(tmp_path, base(), 2, 8)


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    cartridge = bench.compare_cartridges(1, "cpu", **SMALL, **ASKED, n_tokens=4)
    words = bench.compare_task_tokens(1, "cpu", **SMALL, **ASKED, vocab_size=VOCAB, n_names=3)
    assert set(cartridge["times ours"]) == {"train: PEFT", "generate: PEFT", "train: checkpointing"}
    assert set(words["times ours"]) == {"train: PEFT", "generate: PEFT"}
    for part in (cartridge, words):
        assert set(part["peak MB"]) == set(part["ms"]) and min(part["peak MB"].values()) > 0
        assert all(0 < cell["p20"] <= cell["p50"] <= cell["p80"] for cell in part["ms"].values())
    monkeypatch.setattr(bench, "compare_cartridges", lambda rounds, device: cartridge)
    monkeypatch.setattr(bench, "compare_task_tokens", lambda rounds, device: words)
    output = tmp_path / "out.json"
    arguments = ["bench", "token_memories", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "MEMLAYERS_ARMT": None})
    assert result.exit_code == 0, result.output
    assert "generate: PEFT" in result.output and "associative-recurrent-memory-transformer" in result.output
    report = json.loads(output.read_text())
    assert report["cartridge"] == cartridge and report["task tokens"] == words and report["versions"]["peft"]
