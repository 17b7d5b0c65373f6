"""Evaluation end to end: a model that finds every key it can see, a random one, checkpoints on disk."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.config import ARMS, CONTROLS, EvalConfig
from memlayers.eval.output import read_report
from memlayers.eval.run import evaluate, evaluate_model, load_config

PASSKEY = {"task": {"type": "passkey"}, "lengths": [40, 128], "depths": [0.0, 1.0], "n": 12}
CELL = {"n", "accuracy", "ci_low", "ci_high"}


class Finder(LlamaForCausalLM):
    """Says the key that stands in its input, and nothing useful otherwise: an oracle for what each arm gets to see."""

    tokenizer = None

    def generate(self, ids, **kwargs):
        found = [re.search(r"key is (\d{5})\.", self.tokenizer.decode(row)) for row in ids]
        said = [
            self.tokenizer.encode(f" {m[1] if m else 'unknown'}.", add_special_tokens=False)[:12]
            for m in found
        ]
        said = torch.tensor([row + [0] * (12 - len(row)) for row in said])
        return torch.cat([ids, said], dim=1)


@pytest.fixture
def finder(tiny_llama, tokenizer):
    model = Finder(tiny_llama.config)
    model.tokenizer = tokenizer
    return model


def attach(model, segment_length=40):
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=4, segment_length=segment_length), name="stream")
    return model


def test_each_arm_sees_what_it_should(finder, tokenizer):
    report = evaluate_model(attach(finder), tokenizer, {"passkey": {**PASSKEY, "regimes": ["F", "W", "D"]}})
    results, controls = report["results"]["passkey"], report["controls"]["passkey"]
    for regime in "FWD":
        assert results[regime]["40"]["base"]["accuracy"] == 1.0
        assert results[regime]["128"]["base"]["accuracy"] == 1.0
        assert (
            results[regime]["128"]["base_cut"]["accuracy"] == 0.5
        )  # depth 1 lies in the last window, depth 0 not
        assert results[regime]["128"]["memory_off"]["accuracy"] == 0.5
        assert controls[regime]["40"]["question_only"]["accuracy"] == 0.0
    assert results["W"]["128"]["trained"]["accuracy"] == 1.0
    assert results["D"]["128"]["trained"]["accuracy"] == 0.0  # the question alone is its input
    assert controls["W"]["128"]["no_needle"]["accuracy"] == 0.0
    assert results["F"]["40"]["trained"]["accuracy"] == 1.0
    assert "do not fit in attention" in results["F"]["128"]["trained"]["not_run"]
    assert report["cells"]["passkey"]["W"]["128"]["base_cut"] == {
        "0.0": pytest.approx({"n": 6, "accuracy": 0.0, "ci_low": 0.0, "ci_high": 0.3903}, abs=1e-4),
        "1.0": pytest.approx({"n": 6, "accuracy": 1.0, "ci_low": 0.6097, "ci_high": 1.0}, abs=1e-4),
    }
    gain = report["gain"]["passkey"]["W"]["128"]
    assert gain["n"] == 12 and gain["gain"] == 0.5
    assert gain["p_mcnemar"] == pytest.approx(2 / 2**6)
    assert gain["p_holm"] >= gain["p_mcnemar"]
    assert 0 < gain["ci_low"] < 0.5 < gain["ci_high"] < 1


def test_shape_of_the_report_and_files(tiny_llama, tokenizer, tmp_path):
    suites = {
        "passkey": PASSKEY,
        "needle": {
            "task": {"type": "needle", "n_keys": 2, "n_questions": 2, "digits": 3},
            "windows": [4],
            "n": 6,
        },
    }
    report = evaluate_model(attach(tiny_llama), tokenizer, suites, output_dir=tmp_path / "out", batch_size=5)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "needle.png", "passkey.png", "report.json", "report.md", "samples.jsonl",
    ]  # fmt: skip
    written = read_report(tmp_path / "out/report.json")
    assert written.pop("samples_checksum")
    assert written == report
    assert report["config"]["window"] == 40
    assert report["wall_s"] > 0 and report["versions"]["torch"] == torch.__version__
    assert list(report["results"]["needle"]["D"]) == ["160"]
    for group, names in (("results", ARMS), ("controls", CONTROLS)):
        for suite in suites:
            for regime, by_length in report[group][suite].items():
                for length, cells in by_length.items():
                    assert list(cells) == list(names)
                    for name, cell in cells.items():
                        assert set(cell) in (CELL, {"not_run"}), (group, suite, regime, length, name, cell)
    assert set(report["controls"]["passkey"]["D"]["128"]["shuffled_memory"]) == CELL
    assert "no state" in report["controls"]["passkey"]["W"]["128"]["shuffled_memory"]["not_run"]

    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    wanted = {
        "suite",
        "regime",
        "length",
        "depth",
        "arm",
        "question",
        "prediction",
        "answers",
        "correct",
        "substring",
    }
    assert all(wanted <= set(row) for row in rows)
    for suite, regime, length, arm in (("passkey", "D", 128, "trained"), ("needle", "W", 160, "base_cut")):
        cell = report["results"][suite][regime][str(length)][arm]
        mine = [
            r
            for r in rows
            if (r["suite"], r["regime"], r["length"], r["arm"]) == (suite, regime, length, arm)
        ]
        assert len(mine) == cell["n"]
        assert sum(r["correct"] for r in mine) / len(mine) == cell["accuracy"]
    asked = {
        (r["arm"], r["haystack"], tuple(r["answers"]))
        for r in rows
        if r["suite"] == "needle" and r["regime"] == "D"
    }
    assert len({(h, a) for _, h, a in asked}) == 6  # every arm and control is asked the same six questions
    text = (tmp_path / "out/report.md").read_text()
    assert "## passkey, regime D" in text and "Not run:" in text and "n=12" in text
    assert (tmp_path / "out/passkey.png").read_bytes().startswith(b"\x89PNG")


def test_longer_than_the_positions_is_not_run_with_the_reason(tiny_llama, tokenizer):
    suites = {"passkey": {**PASSKEY, "lengths": [257, 256], "n": 2, "regimes": ["D"]}}
    results = evaluate_model(attach(tiny_llama), tokenizer, suites)["results"]["passkey"]["D"]
    assert results["257"]["base"] == {"not_run": "257 tokens are longer than the model's 256 positions"}
    assert set(results["256"]["base"]) == CELL
    assert set(results["257"]["trained"]) == CELL


def test_a_memory_that_outgrows_the_positions_is_not_run_with_the_reason(tiny_llama, tokenizer):
    config = ml.MemoryTokensConfig(n_tokens=16, segment_length=32, mode="accumulate")
    ml.attach(tiny_llama, config, name="stream")
    suites = {"passkey": {**PASSKEY, "lengths": [64, 900], "n": 2, "regimes": ["D"]}}
    report = evaluate_model(tiny_llama, tokenizer, suites)
    cells = report["results"]["passkey"]["D"]
    assert set(cells["64"]["trained"]) == CELL
    assert "256" in cells["900"]["trained"]["not_run"] and "256" in cells["900"]["untrained"]["not_run"]
    assert "not_run" in report["controls"]["passkey"]["D"]["900"]["no_needle"]


def test_a_window_past_the_positions_is_an_error(tiny_llama, tokenizer):
    with pytest.raises(ConfigError, match="window: 500 tokens are more than the model's 256 positions"):
        evaluate_model(tiny_llama, tokenizer, {"passkey": PASSKEY}, window=500)


def test_too_short_a_length_is_not_run_with_the_reason(tiny_llama, tokenizer):
    suites = {"passkey": {**PASSKEY, "lengths": [10], "n": 2}}
    report = evaluate_model(attach(tiny_llama), tokenizer, suites)
    cells = [
        c for g in ("results", "controls") for r in report[g]["passkey"].values() for c in r["10"].values()
    ]
    assert len(cells) == 3 * 9
    assert all("too short" in c["not_run"] or "no state" in c["not_run"] for c in cells)


def test_a_plain_model_has_only_full_attention(tiny_llama, tokenizer):
    report = evaluate_model(tiny_llama, tokenizer, {"passkey": {**PASSKEY, "n": 2}})
    results = report["results"]["passkey"]
    assert results["F"]["128"]["trained"] == results["F"]["128"]["base"]
    assert "no memory" in results["F"]["128"]["untrained"]["not_run"]
    assert "no memory" in results["F"]["128"]["memory_off"]["not_run"]
    assert "memory that keeps a state" in results["D"]["128"]["trained"]["not_run"]
    assert report["config"]["window"] == 256


def test_the_model_is_left_as_it_was(tiny_llama, tokenizer):
    attach(tiny_llama).train()
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    evaluate_model(tiny_llama, tokenizer, {"passkey": {**PASSKEY, "n": 2, "lengths": [64]}})
    after = tiny_llama.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert tiny_llama.training and list(ml.memories(tiny_llama)) == ["stream"]


def test_same_seed_same_answers_and_other_seed_other_items(tiny_llama, tokenizer):
    attach(tiny_llama)
    suites = {"passkey": {**PASSKEY, "n": 4, "lengths": [64]}}
    first, again, other = (evaluate_model(tiny_llama, tokenizer, suites, seed=s) for s in (0, 0, 1))
    assert first["samples"] == again["samples"]
    assert [r["answers"] for r in first["samples"]] != [r["answers"] for r in other["samples"]]


@pytest.fixture
def checkpoint(tiny_llama, tokenizer, tmp_path):
    """A base on disk, and a wrapped checkpoint whose base was trained too (all its weights moved)."""
    tiny_llama.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    model = attach(LlamaForCausalLM.from_pretrained(tmp_path / "original"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    ml.save(model, tmp_path / "out", save_base=True)
    return tmp_path


def test_a_checkpoint_is_measured_against_its_original_base(checkpoint, tiny_llama, tokenizer):
    suites = {"passkey": {**PASSKEY, "n": 4, "lengths": [64], "regimes": ["W"]}}
    config = EvalConfig(model=str(checkpoint / "out"), suites=suites)
    report = evaluate(config, checkpoint / "eval", progress=False)
    rows = [json.loads(line) for line in (checkpoint / "eval/samples.jsonl").read_text().splitlines()]
    plain = evaluate_model(
        tiny_llama, tokenizer, {"passkey": {**suites["passkey"], "regimes": ["F"]}}, window=40
    )
    for arm in ("base", "base_cut"):
        said = [row["prediction"] for row in rows if row["arm"] == arm]
        assert said == [row["prediction"] for row in plain["samples"] if row["arm"] == arm]
        assert said != [row["prediction"] for row in rows if row["arm"] == "memory_off"]
    assert report["config"]["model"] == str(checkpoint / "out")


def test_without_a_tokenizer_or_a_model_the_error_says_what_to_give(checkpoint, tmp_path):
    suites = {"passkey": {**PASSKEY, "n": 2}}
    for file in (checkpoint / "original").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer="):
        evaluate(EvalConfig(model=str(checkpoint / "out"), suites=suites), tmp_path / "e", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(EvalConfig(model=str(checkpoint / "nowhere"), suites=suites), tmp_path / "e", progress=False)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_the_configs_in_the_repository_load(name, request):
    path = request.config.rootpath / f"configs/eval/{name}.yaml"
    config = load_config(path, ["model=elsewhere", "batch_size=2"])
    assert config.model == "elsewhere" and config.batch_size == 2
    assert path.read_text().startswith(f"# memlayers eval --config configs/eval/{name}.yaml model=out/\n")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lengths": None}, "lengths"),
        ({"windows": [1]}, "lengths"),
        ({"depths": [1.5]}, "depths"),
        ({"regimes": ["Q"]}, r"suites\.passkey\.regimes\.0"),
        ({"length": [3]}, r"suites\.passkey\.length: unknown field, did you mean 'lengths'"),
        ({"lengths": [64, 64]}, "twice"),
        ({"task": {"type": "pass"}}, r"suites\.passkey\.task.*'passkey'"),
    ],
)
def test_wrong_fields_are_named(tiny_llama, tokenizer, fields, said):
    with pytest.raises(ConfigError, match=said):
        evaluate_model(tiny_llama, tokenizer, {"passkey": {**PASSKEY, **fields}})
