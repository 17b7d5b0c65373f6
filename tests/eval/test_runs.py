"""Several reports in one table."""

import json

import pytest

from memlayers.eval.summary import load_group, over_seeds, summary


def report(accuracy: float, perplexity: float) -> dict:
    def cell(value):
        return {"n": 40, "accuracy": value, "ci_low": 0.0, "ci_high": 1.0}

    arms = {"base": {"not_run": "too long"}, "base_cut": cell(0.01), "memory_off": cell(0.0)}
    arms |= {"untrained": cell(0.0), "trained": cell(accuracy)}
    prose = {arm: {"perplexity": perplexity} for arm in arms}
    return {
        "config": {"window": 32, "controls": ["no_needle"], "suites": {"passkey": {"n": 40}}},
        "results": {"passkey": {"D": {"64": arms}}},
        "controls": {"passkey": {"D": {"64": {"no_needle": cell(0.02)}}}},
        "perplexity": prose,
    }


def test_mean_and_range_over_seeds():
    assert over_seeds([{"accuracy": 0.9}, {"accuracy": 1.0}], "accuracy", 2) == "0.95 (0.90 to 1.00)"
    assert over_seeds([{"accuracy": 0.9}], "accuracy", 3) == "0.900"
    assert over_seeds([{"accuracy": 0.9}, {"not_run": "why"}], "accuracy", 2) == "not run"


def test_table_of_two_trainings(tmp_path):
    for name, values in {"a": [(0.9, 7.0), (1.0, 9.0)], "b": [(0.5, 8.0)]}.items():
        for seed, (accuracy, perplexity) in enumerate(values):
            folder = tmp_path / name / f"seed{seed}" / "eval"
            folder.mkdir(parents=True)
            if name == "a":
                log = [json.dumps({"step": step}) for step in (10, 100 * (seed + 1))]
                (folder.parent / "log.jsonl").write_text("\n".join(log) + "\n")
            (folder / "report.json").write_text(json.dumps(report(accuracy, perplexity)))
    groups = [load_group(f"ours@D={tmp_path}/a/seed*/eval"), load_group(f"other@D={tmp_path}/b/seed*/eval")]
    text = summary(groups, "passkey")
    assert "| ours | D | 0.950 (0.900 to 1.000) |" in text
    assert "| other | D | 0.500 |" in text
    assert "| ours: no_needle | D | 0.020 (0.020 to 0.020) |" in text
    assert "| original checkpoint: base | D | not run |" in text
    assert "| ours: trained | 8.00 (7.00 to 9.00) |" in text
    assert "| ours | 150 (100 to 200) |" in text and "| other | 1" not in text
    assert "Seeds: ours: 2, other: 1." in text


def test_an_evaluation_that_asked_less_leaves_cells_open(tmp_path):
    """Each figure stands under its length, and arms that nobody asked have no row."""
    for name, lengths in {"a": ("64",), "b": ("32", "128", "64")}.items():
        (folder := tmp_path / name).mkdir()
        made = report(0.5, 8.0)
        cell = made["results"]["passkey"]["D"].pop("64")["trained"]
        for length in lengths:
            made["results"]["passkey"]["D"][length] = {"trained": {**cell, "accuracy": int(length) / 1000}}
        del made["perplexity"]
        (folder / "report.json").write_text(json.dumps(made))
    text = summary([load_group(f"{name}@D={tmp_path}/{name}") for name in "ab"], "passkey")
    assert "| 32 tokens | 64 tokens | 128 tokens |" in text
    assert "| a | D | – | 0.064 | – |" in text and "| b | D | 0.032 | 0.064 | 0.128 |" in text
    assert "untrained" not in text and "original checkpoint" not in text


def test_missing_reports_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ours: no report\.json"):
        load_group(f"ours@D={tmp_path}/nothing*")
    with pytest.raises(ValueError, match="NAME@REGIME=GLOB"):
        load_group("nothing")


def test_a_suite_that_is_not_there_is_named(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report(0.5, 8.0)))
    with pytest.raises(ValueError, match="--suite: ours has no suite 'mqar', but passkey"):
        summary([load_group(f"ours@D={tmp_path}")], "mqar")
