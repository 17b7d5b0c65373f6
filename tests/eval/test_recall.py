"""Recall end to end: a model that finds every key it can see, a random one, checkpoints on disk."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiments.recall import RecallConfig
from memlayers.eval.models import ARMS, CONTROLS
from memlayers.eval.runner import Results, evaluate, evaluate_model, load_config

PASSKEY = {"task": {"type": "passkey"}, "lengths": [40, 128], "depths": [0.0, 1.0], "n": 12}
FULL, STREAM, MEMORY = "full_context", "sliding_window", "memory_only"


def run(model, tokenizer, passkey: dict, **fields) -> Results:
    return evaluate_model(model, tokenizer, suites={"passkey": passkey}, **fields)


def cell(results: Results, condition: str, length: int, arm: str, suite: str = "passkey") -> dict:
    return results.cell(suite=suite, condition=condition, length=length, arm=arm)


class Finder(LlamaForCausalLM):
    """Predicts the key that stands in its input, and nothing useful otherwise: an oracle for what each arm gets to see."""

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
    results = run(attach(finder), tokenizer, PASSKEY)

    def accuracy(condition, length, arm):
        return cell(results, condition, length, arm)["value"]

    for condition in (FULL, STREAM, MEMORY):
        assert accuracy(condition, 40, "base") == accuracy(condition, 128, "base") == 1.0
        assert (
            accuracy(condition, 128, "base_truncated") == 0.5
        )  # depth 1 lies in the last window, depth 0 not
        assert accuracy(condition, 128, "memory_disabled") == 0.5
        assert accuracy(condition, 40, "question_only") == 0.0
    assert accuracy(STREAM, 128, "trained") == 1.0
    assert accuracy(MEMORY, 128, "trained") == 0.0  # the question alone is its input
    assert accuracy(STREAM, 128, "no_needle") == 0.0
    assert accuracy(FULL, 40, "trained") == 1.0
    assert "do not fit in attention" in cell(results, FULL, 128, "trained")["not_run"]
    by_depth = [
        [
            r["correct"]
            for r in results.records
            if (r["condition"], r["length"], r["arm"], r.get("depth")) == at
        ]
        for at in ((STREAM, 128, "base_truncated", 0.0), (STREAM, 128, "base_truncated", 1.0))
    ]
    assert by_depth == [[False] * 6, [True] * 6]
    gain = results.cell(condition=STREAM, length=128, arm="trained", over="base_truncated")
    assert (gain["n"], gain["value"]) == (12, 0.5)
    assert gain["p"] == pytest.approx(2 / 2**6) and gain["p_holm"] >= gain["p"]
    assert 0 < gain["low"] < 0.5 < gain["high"] < 1


def test_every_arm_and_control_has_its_cell_and_the_same_questions(tiny_llama, tokenizer, tmp_path):
    needle = {"task": {"type": "needle", "n_keys": 2, "n_questions": 2, "digits": 3}, "windows": [4], "n": 6}
    suites = {"passkey": PASSKEY, "needle": needle}
    results = evaluate_model(attach(tiny_llama), tokenizer, suites=suites, output_dir=tmp_path, batch_size=5)
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert names == {
        "records.jsonl", "report.md", "report.html", "report.json",
        "passkey.png", "passkey_length.png", "needle.png", "needle_length.png",
    }  # fmt: skip
    for suite, lengths in (("passkey", (40, 128)), ("needle", (160,))):
        for condition in (FULL, STREAM, MEMORY):
            for length in lengths:
                for arm in (*ARMS, *CONTROLS):
                    found = cell(results, condition, length, arm, suite)
                    assert "value" in found or found["not_run"]
    assert "keeps no state" in cell(results, STREAM, 128, "shuffled_memory")["not_run"]
    found = cell(results, MEMORY, 160, "trained", "needle")
    assert (found["n"], found["units"]) == (6, 3)  # two questions about a haystack are not independent
    asked = {
        (r["arm"], r["unit"], tuple(r["answers"]))
        for r in results.records
        if (r["suite"], r["condition"]) == ("needle", MEMORY) and "correct" in r
    }
    assert len({(h, a) for _, h, a in asked}) == 6
    text = (tmp_path / "report.md").read_text()
    assert "## passkey, memory_only" in text and "Not run:" in text


def test_a_state_that_grows_and_the_bytes_of_one_that_does_not(tiny_llama, tokenizer):
    few = {**PASSKEY, "lengths": [64, 200], "n": 2, "conditions": [MEMORY]}
    results = run(attach(tiny_llama), tokenizer, few)
    sizes = {r["state_bytes"] for r in results.records if r.get("state_bytes")}
    assert len(sizes) == 1 and not results.report["warnings"]
    ml.detach(tiny_llama)
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=16, segment_length=32, mode="accumulate"))
    warnings = run(tiny_llama, tokenizer, few).report["warnings"]
    assert any("The state of trained grows with the text" in warning for warning in warnings)


def test_stale_answers_are_told_from_wrong_ones(finder, tokenizer):
    results = run(attach(finder), tokenizer, {**PASSKEY, "conditions": [STREAM]}, controls=[])
    assert not any(r["stale"] for r in results.records if "stale" in r)
    answers = {r["unit"]: r["answers"][0] for r in results.records if r.get("length") == 40}
    finder.generate = lambda ids, **_: torch.cat([ids, torch.tensor([stale(row) for row in ids])], dim=1)

    def stale(row):
        (key,) = re.findall(r"key is (\d{5})\.", tokenizer.decode(row)) or ["0"]
        number = next((n for n, answer in answers.items() if answer == key), 0)
        ids = tokenizer.encode(f" {answers[(number + 1) % 12]}.", add_special_tokens=False)[:12]
        return ids + [0] * (12 - len(ids))

    results = run(finder, tokenizer, {**PASSKEY, "lengths": [40], "conditions": [STREAM]}, controls=[])
    found = [r for r in results.records if r["arm"] == "trained"]
    assert all(r["stale"] and not r["correct"] for r in found)


def test_longer_than_the_positions_is_not_run_with_the_reason(tiny_llama, tokenizer):
    results = run(
        attach(tiny_llama), tokenizer, {**PASSKEY, "lengths": [257, 256], "n": 2, "conditions": [MEMORY]}
    )
    reason = "257 tokens are longer than the model's 256 positions"
    assert cell(results, MEMORY, 257, "base")["not_run"] == reason
    assert "value" in cell(results, MEMORY, 256, "base") and "value" in cell(results, MEMORY, 257, "trained")


def test_a_memory_that_outgrows_the_positions_is_not_run_with_the_reason(tiny_llama, tokenizer):
    ml.attach(
        tiny_llama, ml.MemoryTokensConfig(n_tokens=16, segment_length=32, mode="accumulate"), name="stream"
    )
    results = run(tiny_llama, tokenizer, {**PASSKEY, "lengths": [64, 900], "n": 2, "conditions": [MEMORY]})
    assert "value" in cell(results, MEMORY, 64, "trained")
    for arm in ("trained", "untrained"):
        assert "256" in cell(results, MEMORY, 900, arm)["not_run"]
    assert "not_run" in cell(results, MEMORY, 900, "no_needle")


def test_a_window_past_the_positions_is_an_error(tiny_llama, tokenizer):
    with pytest.raises(ConfigError, match="window: 500 tokens are more than the model's 256 positions"):
        run(tiny_llama, tokenizer, PASSKEY, window=500)


def test_too_short_a_length_is_not_run_with_the_reason(tiny_llama, tokenizer):
    results = run(attach(tiny_llama), tokenizer, {**PASSKEY, "lengths": [10], "n": 2})
    assert len(results.records) == 3 * 9
    assert all("too short" in r["not_run"] or "no state" in r["not_run"] for r in results.records)


def test_a_plain_model_has_only_full_attention(tiny_llama, tokenizer):
    results = run(tiny_llama, tokenizer, {**PASSKEY, "n": 2})
    assert cell(results, FULL, 128, "trained")["value"] == cell(results, FULL, 128, "base")["value"]
    for arm in ("untrained", "memory_disabled"):
        assert "no memory" in cell(results, FULL, 128, arm)["not_run"]
    assert "memory that keeps a state" in cell(results, MEMORY, 128, "trained")["not_run"]


def test_the_model_is_left_as_it_was(tiny_llama, tokenizer):
    attach(tiny_llama).train()
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    run(tiny_llama, tokenizer, {**PASSKEY, "n": 2, "lengths": [64]})
    after = tiny_llama.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert tiny_llama.training and list(ml.memories(tiny_llama)) == ["stream"]


def test_same_seed_same_answers_and_other_seed_other_items(tiny_llama, tokenizer):
    attach(tiny_llama)
    few = {**PASSKEY, "n": 4, "lengths": [64]}
    first, again, other = (run(tiny_llama, tokenizer, few, seeds=[s]).records for s in (0, 0, 1))
    assert first == again
    assert [r.get("answers") for r in first] != [r.get("answers") for r in other]


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
    suites = {"passkey": {**PASSKEY, "n": 4, "lengths": [64], "conditions": [STREAM]}}
    config = RecallConfig(model=str(checkpoint / "out"), suites=suites)
    records = evaluate(config, checkpoint / "eval", progress=False).records
    plain = run(tiny_llama, tokenizer, {**suites["passkey"], "conditions": [FULL]}, window=40).records
    for arm in ("base", "base_truncated"):
        said = [r["prediction"] for r in records if r["arm"] == arm]
        assert said == [r["prediction"] for r in plain if r["arm"] == arm]
        assert said != [r["prediction"] for r in records if r["arm"] == "memory_disabled"]


def test_without_a_tokenizer_or_a_model_the_error_says_what_to_give(checkpoint, tmp_path):
    suites = {"passkey": {**PASSKEY, "n": 2}}
    for file in (checkpoint / "original").glob("tokenizer*"):
        file.unlink()
    for model, told in (("out", "tokenizer="), ("nowhere", "nowhere")):
        with pytest.raises(FileNotFoundError, match=told):
            evaluate(
                RecallConfig(model=str(checkpoint / model), suites=suites), tmp_path / "e", progress=False
            )
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_the_configs_in_the_repository_load(name, request):
    path = request.config.rootpath / f"configs/eval/{name}.yaml"
    config = load_config(path, ["model=elsewhere", "batch_size=2"])
    assert config.model == "elsewhere" and config.batch_size == 2
    assert path.read_text().startswith(f"# memlayers eval configs/eval/{name}.yaml model=out/\n")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lengths": None}, "lengths"),
        ({"windows": [1]}, "lengths"),
        ({"depths": [1.5]}, "depths"),
        ({"conditions": ["memory_onyl"]}, r"suites\.passkey\.conditions\.0.*did you mean 'memory_only'"),
        ({"length": [3]}, r"suites\.passkey\.length: unknown field, did you mean 'lengths'"),
        ({"lengths": [64, 64]}, "twice"),
        ({"task": {"type": "pass"}}, r"suites\.passkey\.task.*'passkey'"),
    ],
)
def test_wrong_fields_are_named(tiny_llama, tokenizer, fields, said):
    with pytest.raises(ConfigError, match=said):
        run(tiny_llama, tokenizer, {**PASSKEY, **fields})
