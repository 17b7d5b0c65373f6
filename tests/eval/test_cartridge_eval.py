"""The measurement of cartridges: that the arms are what they are called, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiments.cartridge import (
    EXPERIMENT,
    CartridgeEvalConfig,
    TextsSection,
    after_reading,
    draw,
)
from memlayers.eval.models import load_plain
from memlayers.eval.report import to_frame
from memlayers.eval.runner import evaluate
from memlayers.tasks.words import NOISE_SENTENCES
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "eval" / "cartridge.yaml"
WRITERS = {
    "next token": {"steps": 2, "learning_rate": 0.01, "segment_length": 8},
    "distilled": {
        "steps": 2,
        "learning_rate": 0.01,
        "distill": {"continuations": 3, "length": 6, "batch": 2},
    },
}


@pytest.fixture
def small(tiny_llama, tokenizer, tmp_path):
    """A config of two sources on a tiny model that is far from uniform."""
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.mul_(6)
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>\n".join([" ".join(NOISE_SENTENCES)] * 2), encoding="utf-8")
    return CartridgeEvalConfig(
        model=str(tmp_path / "base"),
        texts={"own": {"n": 3}, "file": {"file": str(text), "n": 3}},
        text_length=20,
        continuation_length=8,
        sizes=[4, 20],
        writers=WRITERS,
        seeds=[3],
        resamples=100,
    )


def test_every_arm(small, tmp_path):
    out = tmp_path / "out"
    results = evaluate(small, out, progress=False)
    refined = [a for w in WRITERS for a in (w, f"{w}, another text's")]
    arms = [("whole text", 20), ("nothing", 1)]
    arms += [(arm, size) for size in (4, 20) for arm in ("last tokens", "not refined")]
    arms += [(arm, 4) for arm in refined]
    found = {(r["texts"], r["arm"], r["tokens"]) for r in results.records if "loss" in r}
    assert found == {(source, *arm) for source in ("own", "file") for arm in arms}
    for source in ("own", "file"):

        def cell(arm, tokens, metric, source=source):
            found = results.cell(texts=source, arm=arm, tokens=tokens, metric=metric)
            return found["value"], found["low"], found["high"]

        assert cell("not refined", 20, "beside reading") == pytest.approx((1, 1, 1), abs=1e-4)
        assert cell("last tokens", 20, "beside reading") == pytest.approx((1, 1, 1), abs=1e-6)
        assert cell("whole text", 20, "kept") == pytest.approx((1, 1, 1))
        assert cell("nothing", 1, "kept") == (0, 0, 0)
        # keys and values of 2 layers, 2 heads of 8 numbers in float32, and an int64 for the length
        sizes = {r["bytes"] for r in results.records if r.get("tokens") == 4 and r["bytes"]}
        assert sizes == {4 * 2 * 2 * 2 * 8 * 4 + 8}
        refined = cell("distilled", 4, "perplexity")
        assert refined != cell("not refined", 4, "perplexity")
        assert refined != cell("distilled, another text's", 4, "perplexity")
    assert (out / "perplexity.png").read_bytes()[:4] == b"\x89PNG"


def test_not_refined_is_reading_the_first_tokens(small, tmp_path):
    small = small.model_copy(update={"writers": {}})
    results = evaluate(small, tmp_path / "out", progress=False)
    base, tokenizer = load_plain(small.model).eval(), AutoTokenizer.from_pretrained(small.model)
    for source, section in small.texts.items():
        rows = draw(base, tokenizer, section, 28, seed=3)
        found = [
            r["loss"]
            for r in results.records
            if (r["texts"], r["arm"], r["tokens"]) == (source, "not refined", 4)
        ]
        assert found == pytest.approx(after_reading(base, rows[:, :4], rows[:, 20:]).tolist(), abs=1e-4)


def test_texts_are_drawn_from_a_file_and_by_the_base(small, tokenizer):
    base = load_plain(small.model).eval()
    for section in small.texts.values():
        rows, again, other = (draw(base, tokenizer, section, 28, seed=s) for s in (1, 1, 2))
        assert rows.shape == (3, 28) and torch.equal(rows, again) and not torch.equal(rows, other)
        assert (rows[:, 0] == tokenizer.bos_token_id).all() and len({tuple(r) for r in rows.tolist()}) == 3
    whole = Path(small.texts["file"].file).read_text(encoding="utf-8").replace("<|endoftext|>\n", "<s>")
    said = tokenizer.decode(draw(base, tokenizer, small.texts["file"], 28, seed=1)[0, 1:])
    assert said in "<s>" + whole


def test_the_share_kept():
    frame = to_frame(
        [{"seed": 0, "unit": n, "gained": g, "whole": w} for n, (g, w) in enumerate([(1, 1), (0, 3)])]
    )
    found = EXPERIMENT.metric("kept").estimate(frame, 100, 0)
    assert (found["value"], found["low"], found["high"]) == (0.25, 0, 1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sizes=[385]", "sizes: 385 is more than the 384"),
        ("sizes=[8,8]", "sizes: .* names a value twice"),
        ("texts.grimm.files=x", "texts.grimm.files"),
        ("writers.distilled.distill.batch=100", "writers.distilled.distill.*batch: 100 is more"),
        ("writers.distilled.streaming=true", "writers.distilled.*streaming: distill reads the text whole"),
    ],
)
def test_bad_fields(override, said):
    with pytest.raises(ConfigError, match=said):
        load_yaml(YAML, [override], CartridgeEvalConfig)


def test_what_does_not_fit(small, tmp_path):
    with pytest.raises(ConfigError, match="text_length: with the continuation 328 tokens, the model has 256"):
        evaluate(small.model_copy(update={"text_length": 320}), tmp_path / "out", progress=False)
    few = {"file": TextsSection(file=small.texts["file"].file, n=2000)}
    with pytest.raises(ConfigError, match=r"texts.n: .* too few for 2000 windows"):
        evaluate(small.model_copy(update={"texts": few}), tmp_path / "out", progress=False)
    gone = {"file": TextsSection(file="nowhere.txt")}
    with pytest.raises(FileNotFoundError, match=r"texts.file: there is no file 'nowhere.txt'"):
        evaluate(small.model_copy(update={"texts": gone}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_committed_config():
    config = load_yaml(YAML, [], CartridgeEvalConfig)
    assert 38 in config.sizes and config.text_length + config.continuation_length == 512
    assert isinstance(config.writers["distilled"].distill, ml.writing.DistillSection)
