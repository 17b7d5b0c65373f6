"""Resuming, refusing, and several runs together: on an experiment that costs nothing."""

from __future__ import annotations

import builtins
import json
import random
import re
from pathlib import Path
from typing import Literal

import pytest

from memlayers.config import ConfigError
from memlayers.eval import registry
from memlayers.eval.experiment import Bars, Experiment, ExperimentConfig, Gains, Heatmap, Lines, Table
from memlayers.eval.output import read_records
from memlayers.eval.runner import evaluate, load_config
from memlayers.eval.runs import compare, report_runs
from memlayers.eval.statistics import Mean, Share


class CoinConfig(ExperimentConfig):
    experiment: Literal["coin"] = "coin"
    model: str = "fair"
    lengths: list[int] = [1, 2]  # noqa: RUF012
    leak: float = 0.0
    fail_at: int | None = None


MEASURED: list[int] = []


def run(config, seed, progress):
    if seed == config.fail_at:
        raise KeyboardInterrupt
    MEASURED.append(seed)
    rng = random.Random(f"{config.model}{seed}")
    for length in progress(config.lengths):
        for arm, share in (("trained", 0.9), ("base", 0.5), ("control", config.leak)):
            for unit in range(20):
                at = {"arm": arm, "length": length, "depth": unit % 2, "unit": unit, "answers": [unit]}
                yield {**at, "correct": rng.random() < share, "chance": 0.01}
    yield {"arm": "trained", "length": 3, "not_run": "3 is too long"}


COIN = Experiment(
    title="Coins",
    about="Tossed.",
    config=CoinConfig,
    run=run,
    keys=("length", "arm"),
    unit="toss",
    metrics=(Share(), Mean("correct", "mean")),
    controls=("control",),
    views=(
        Table(title="All", rows=("length",), cols="arm", metrics=("accuracy",)),
        Gains(title="Gain", rows=("length",), over="base", metrics=("accuracy",)),
        Lines(title="Lines", file="lines", x="length", hue="arm", metrics=("accuracy",)),
        Bars(title="Bars", file="bars", x="arm", hue="length", metrics=("mean",)),
        Heatmap(title="Map", file="map", panels=("arm",), x="length", y="depth", metrics=("accuracy",)),
    ),
)


@pytest.fixture(autouse=True)
def coin(monkeypatch):
    monkeypatch.setitem(registry.EXPERIMENTS, "coin", COIN)
    MEASURED.clear()


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def without_times(found: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name: re.sub(rb'"wall_s": [\d.]+|; \d+ s\.|"checksum": "\w+"', b"", data)
        for name, data in found.items()
    }


def test_an_interrupted_evaluation_goes_on_to_the_same_report(tmp_path):
    evaluate(CoinConfig(), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(CoinConfig(fail_at=1), tmp_path / "parts", progress=False)
    head, records = read_records(tmp_path / "parts")
    assert list(head["seeds"]) == ["0"] and {r["seed"] for r in records} == {0}
    text = (tmp_path / "parts" / "records.jsonl").read_text()
    (tmp_path / "parts" / "records.jsonl").unlink()
    fixed = text.replace('"fail_at": 1', '"fail_at": null').replace(
        head["config_hash"], read_records(tmp_path / "whole")[0]["config_hash"]
    )
    (tmp_path / "again").mkdir()
    from memlayers.eval.output import write_output

    write_output(tmp_path / "again", {"records.jsonl": fixed})
    MEASURED.clear()
    evaluate(CoinConfig(), tmp_path / "again", progress=False)
    assert MEASURED == [1, 2]
    assert without_times(files(tmp_path / "again")) == without_times(files(tmp_path / "whole"))


def test_a_finished_run_is_not_measured_again_and_more_seeds_are(tmp_path):
    evaluate(CoinConfig(seeds=[0]), tmp_path, progress=False)
    before = files(tmp_path)
    evaluate(CoinConfig(seeds=[0]), tmp_path, progress=False)
    assert MEASURED == [0] and files(tmp_path) == before
    results = evaluate(CoinConfig(seeds=[0, 4]), tmp_path, progress=False)
    assert MEASURED == [0, 4] and results.cell(arm="base", length=1)["n"] == 40


def test_another_config_is_refused_and_names_the_field(tmp_path):
    evaluate(CoinConfig(seeds=[0]), tmp_path, progress=False)
    evaluate(CoinConfig(seeds=[0], note="a word more"), tmp_path, progress=False)
    with pytest.raises(ConfigError, match=r"another config \(leak was 0.0, is 0.5\); give another folder"):
        evaluate(CoinConfig(seeds=[0], leak=0.5), tmp_path, progress=False)


def test_a_model_that_was_trained_on_is_another(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    evaluate(CoinConfig(seeds=[0], model=str(model)), tmp_path / "out", progress=False)
    (model / "weights").write_text("2")
    with pytest.raises(ConfigError, match="model has changed since it was measured"):
        evaluate(CoinConfig(seeds=[0], model=str(model)), tmp_path / "out", progress=False)


def test_the_report_stands_alone_and_names_no_folder_of_this_machine(tmp_path):
    evaluate(CoinConfig(seeds=[0]), tmp_path, progress=False)
    page, text = ((tmp_path / f"report.{ending}").read_text() for ending in ("html", "md"))
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page and "http" not in page
    assert "Not run: 3 trained: 3 is too long." in text and "not run" in text
    for name, data in files(tmp_path).items():
        assert str(tmp_path).encode() not in data, name
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tables"][0]["cells"][0].keys() >= {"arm", "length", "value", "low", "high", "n", "units"}


def test_a_leak_is_a_warning(tmp_path):
    assert not evaluate(CoinConfig(seeds=[0]), tmp_path / "tight", progress=False).report["warnings"]
    warnings = evaluate(CoinConfig(seeds=[0], leak=0.6), tmp_path / "leaky", progress=False).report[
        "warnings"
    ]
    assert len(warnings) == 2 and all("arm control" in each and "must not know" in each for each in warnings)
    for name in ("report.md", "report.html"):
        assert "Warning." in (tmp_path / "leaky" / name).read_text()


def test_runs_beside_each_other_and_as_seeds(tmp_path):
    for name in ("a", "b"):
        evaluate(CoinConfig(seeds=[0, 1], model=name), tmp_path / name, progress=False)
    results = report_runs([f"first={tmp_path}/a", f"second={tmp_path}/b"])
    assert results.cell(run="first", arm="trained", length=1)["n"] == 40
    assert {cell["run"] for cell in results.report["tables"][0]["cells"]} == {"first", "second"}
    together = report_runs([f"both={tmp_path}/[ab]"])
    cell = together.cell(arm="trained", length=1)
    assert cell["n"] == 80 and len(cell["by_seed"]) == 4


def test_runs_of_different_configs_make_no_report(tmp_path):
    evaluate(CoinConfig(seeds=[0]), tmp_path / "a", progress=False)
    evaluate(CoinConfig(seeds=[0], lengths=[1]), tmp_path / "b", progress=False)
    with pytest.raises(
        ConfigError, match=r"b: measured with another config \(lengths was \[1, 2\], is \[1\]\)"
    ):
        report_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(FileNotFoundError, match="no run is there"):
        report_runs([str(tmp_path / "nowhere")])


def test_compare_pairs_the_same_items(tmp_path):
    for name, seeds in (("a", [0, 1]), ("b", [0, 1]), ("c", [7])):
        evaluate(CoinConfig(seeds=seeds, model=name), tmp_path / name, progress=False)
    _, table = compare(str(tmp_path / "a"), str(tmp_path / "a"))
    assert set(table["difference"]) == {"+0.000"} and set(table["p"]) == {"1"}
    _, table = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    records = [read_records(tmp_path / name)[1] for name in ("a", "b")]
    right = [sum(r["correct"] for r in rows if (r["arm"], r["length"]) == ("base", 1)) for rows in records]
    line = table[(table["arm"] == "base") & (table["length"] == 1)].iloc[0]
    assert line["difference"] == f"{(right[0] - right[1]) / 40:+.3f}" and line["n"] == "40"
    with pytest.raises(ConfigError, match="no item in common"):
        compare(str(tmp_path / "a"), str(tmp_path / "c"))


def test_an_unknown_experiment_is_named(tmp_path):
    path = tmp_path / "x.yaml"
    for text, told in (
        ("experiment: cion\n", "did you mean 'coin'"),
        ("model: x\n", "experiment: is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            load_config(path)


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_loads_and_says_how_it_is_run(path):
    assert load_config(path).experiment in registry.EXPERIMENTS
    text = path.read_text()
    assert f"memlayers eval configs/eval/{path.name}" in text.split("experiment:")[0]
    assert re.findall(r"(?<![\w.:/*}])/\w[\w./-]*", text) == []  # no path from the root of one machine


def test_without_pandas_one_line_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError("No module named 'pandas'", name="pandas")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        ImportError, match=r"^pandas is not installed, reports need it: pip install 'memlayers\[eval\]'$"
    ):
        evaluate(CoinConfig(), tmp_path / "out", progress=False)
    assert not MEASURED
