"""What a reversible memory gives back: what is counted, on a tiny random model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiments.reversible import (
    EXPERIMENT,
    GIVEN,
    ReversibleEvalConfig,
    measure_checkpoint,
    right_tokens,
    unseen_segments,
)
from memlayers.eval.models import load_plain
from memlayers.eval.report import to_frame
from memlayers.eval.runner import evaluate
from memlayers.eval.texts import training_prose
from memlayers.tasks.words import NOISE_SENTENCES
from memlayers.yaml_config import load_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
SMALL = {"type": "reversible", "n_tokens": 2, "ratios": [3], "heads": 4, "depth": 2}
SIZE = 6


@pytest.fixture
def fields(tiny_llama, tokenizer, tmp_path) -> dict:
    """A base and a text on disk, and a run of a few steps."""
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(NOISE_SENTENCES * 8))
    arms = {"inverse 3": SMALL, "separate 3": {**SMALL, "backwards": "separate"}}
    return {
        "model": str(tmp_path / "base"),
        "file": str(text),
        "arms": arms,
        "steps": 2,
        "batch_size": 4,
        "n_segments": 9,
        "n_sequences": 3,
        "seeds": [0, 7],
    }


@torch.no_grad()
def test_right_tokens_are_those_that_read_back_says(tiny_llama):
    memory = ml.attach(tiny_llama, ml.ReversibleMemoryConfig(**SMALL), name="past")
    segments = torch.randint(3, 300, (4, SIZE), generator=torch.Generator().manual_seed(0))
    said, _ = ml.read_back(tiny_llama, ml.write(tiny_llama, segments))
    segments[0, :3] = said[0, :3]  # an untrained memory says something; what it says depends on what it read
    said, _ = ml.read_back(tiny_llama, ml.write(tiny_llama, segments))
    expected = [sum(a == b for a, b in zip(*rows)) for rows in zip(said.tolist(), segments.tolist())]
    assert right_tokens(tiny_llama, memory, segments).tolist() == expected
    shuffled = [sum(a == b for a, b in zip(said[i - 1].tolist(), segments[i].tolist())) for i in range(4)]
    assert right_tokens(tiny_llama, memory, segments, shift=1).tolist() == shuffled


def test_shares_and_their_intervals():
    right = enumerate([6, 3, 0, 6])
    frame = to_frame([{"seed": 0, "unit": n, "right": r, "tokens": 6, "correct": r == 6} for n, r in right])
    for name, value in (("tokens that come back", 0.625), ("whole segments", 0.5)):
        found = EXPERIMENT.metric(name).estimate(frame, 100, 0)
        assert found["value"] == value and found["units"] == 4 and found["low"] < value < found["high"]


def test_the_unseen_text_is_not_trained_on(fields, tokenizer, tmp_path):
    sentences = [f"Sentence {n} is here." for n in range(100)]
    Path(fields["file"]).write_text(" ".join(sentences))
    config = ReversibleEvalConfig(**fields)
    seen, unseen = training_prose(config.file, tokenizer), unseen_segments(config, tokenizer, SIZE)
    said = tokenizer.decode(seen)
    assert "Sentence 79 is" in said and "Sentence 80" not in said
    assert unseen.shape == (9, SIZE) and "Sentence 80" in tokenizer.decode(unseen.flatten())


@torch.no_grad()
def test_perplexity_after_a_context(fields, tiny_llama, tokenizer):
    """Of the last segment, by what stands before it."""
    memory = ml.attach(tiny_llama, ml.ReversibleMemoryConfig(**SMALL), name="past")
    memory.norm.weight *= 30  # so that memory matters
    config = ReversibleEvalConfig(**{**fields, "context_segments": 2})
    plain = unseen_segments(config, tokenizer, 3 * SIZE)[:3]
    last, expected = plain[:, -SIZE:], {}

    def mean_loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), last[:, 1:]).item()

    expected["memory"] = mean_loss(tiny_llama(plain).logits[:, -SIZE:])
    state = ml.write(tiny_llama, plain[[2, 0, 1], :-SIZE])
    expected["shuffled memory"] = mean_loss(tiny_llama(last, memory_state=state).logits)
    with ml.disabled(tiny_llama):
        expected["text"] = mean_loss(tiny_llama(plain).logits[:, -SIZE:])
        expected["nothing"] = mean_loss(tiny_llama(last).logits)
    assert len({round(x, 5) for x in expected.values()}) == 4
    records = list(measure_checkpoint(tiny_llama, tokenizer, config, seed=0))
    assert len([r for r in records if "right" in r]) == 9 and records[0]["ratio"] == 3
    losses = {given: [r["loss"] for r in records if r.get("given") == given] for given in GIVEN}
    for given, loss in expected.items():
        assert math.exp(sum(losses[given]) / 3) == pytest.approx(math.exp(loss), rel=1e-4)


def test_every_file(fields, tmp_path):
    base = load_plain(fields["model"])
    ml.attach(base, ml.ReversibleMemoryConfig(**SMALL), name="past")
    for seed in (0, 7):
        ml.save(base, tmp_path / f"trained{seed}")
    config = ReversibleEvalConfig(**fields, checkpoint=str(tmp_path / "trained{seed}"), context_segments=1)
    results = evaluate(config, tmp_path / "out", progress=False)
    for name in fields["arms"]:
        right = [
            r["right"] for r in results.records if (r.get("compressor"), r.get("arm")) == (name, "trained")
        ]
        cell = results.cell(compressor=name, metric="tokens that come back")
        assert len(right) == 2 * 9 and cell["value"] == pytest.approx(sum(right) / (18 * SIZE))
    sizes = {r["parameters"] for r in results.records if "parameters" in r}
    assert len(sizes) == 1, "the plain autoencoder has as many parameters"
    assert (tmp_path / "out" / "reversible.png").is_file()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "seeds 0, 7" in text and "separate 3" in text and "shuffled memory" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("arms={}", "arms: nothing to measure"),
        ("arms={a: {type: tokens}}", r"arms\.a"),
        ("seeds=[1,1]", "seeds: .* names a value twice"),
        ("steps=0", "steps"),
    ],
)
def test_bad_fields(override, said):
    with pytest.raises(ConfigError, match=said):
        load_yaml(CONFIGS / "reversible.yaml", [override], ReversibleEvalConfig)


def test_a_checkpoint_without_such_a_memory(fields, tiny_llama, tokenizer):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=2, segment_length=SIZE))
    with pytest.raises(ValueError, match="checkpoint: needs one reversible memory, found none"):
        list(measure_checkpoint(tiny_llama, tokenizer, ReversibleEvalConfig(**fields), seed=0))


def test_the_committed_configs():
    arms = load_yaml(CONFIGS / "reversible.yaml", [], ReversibleEvalConfig).arms.values()
    assert {arm.segment_length for arm in arms} == {32}
    assert {arm.backwards for arm in arms} == {"inverse", "separate"}
    assert not load_yaml(CONFIGS / "reversible_lm.yaml", [], ReversibleEvalConfig).arms
