"""The experiment of docs/adding_an_experiment.md: one file and one line of the registry give a report and a picture."""

from __future__ import annotations

import importlib.util
import re

import pytest

import memlayers as ml
from memlayers.eval import registry
from memlayers.eval.runner import evaluate_model, load_config


@pytest.fixture
def reading(request, tmp_path, monkeypatch):
    """The module of the page, in the registry."""
    page = (request.config.rootpath / "docs" / "adding_an_experiment.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 65
    (tmp_path / "reading.py").write_text(code)
    spec = importlib.util.spec_from_file_location("reading", tmp_path / "reading.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "reading", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(registry.EXPERIMENTS, "reading", module.EXPERIMENT)
    return module


def test_it_runs_with_report_and_picture(reading, tiny_llama, tokenizer, tmp_path):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=2, segment_length=16), name="stream")
    results = evaluate_model(tiny_llama, tokenizer, "reading", output_dir=tmp_path / "out", seeds=[0, 1])
    cell = results.cell(arm="trained", length=8)
    assert (cell["n"], cell["units"]) == (2 * 4 * 8, 8) and cell["low"] <= cell["value"] <= cell["high"]
    assert results.cell(arm="trained", length=8, over="base")["n"] == 8
    assert (tmp_path / "out" / "reading.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (tmp_path / "out" / "report.html").read_text()


def test_its_config_is_found_by_name(reading, tmp_path):
    path = tmp_path / "reading.yaml"
    path.write_text("experiment: reading\nmodel: x\n")
    assert load_config(path, ["n=2"]).n == 2
