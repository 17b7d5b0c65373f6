"""The benchmark of product-key memory: the layers compute alike, the report is whole, the command writes it."""

import json

import torch
from typer.testing import CliRunner

from memlayers.cli import app
from memlayers.eval.speed import product_key


def test_the_hand_written_layer_equals_ours():
    arms = product_key.layers(width=16, n_keys=8, heads=2, top_k=4, device="cpu")
    ours, other = arms[product_key.OURS], arms["F.embedding_bag"]
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(other(x), ours(x))
    assert arms["memlayers, row-sparse"].sparse and not ours.sparse


def test_rounds_and_ratios():
    part = product_key.compare_layers(3, "cpu", width=16, n_keys=8, heads=2, top_k=4, batch=1, length=4)
    assert part["rounds"] == 3 and part["times ours"][product_key.OURS] == {
        "p20": 1.0,
        "p50": 1.0,
        "p80": 1.0,
    }
    for cells in (part["ms"], part["times ours"]):
        assert {"memlayers", "memlayers, row-sparse", "F.embedding_bag"} <= set(cells)
        assert all(0 < cell["p20"] <= cell["p50"] <= cell["p80"] for cell in cells.values())


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    small = {"width": 16, "n_keys": 8, "heads": 2, "top_k": 4, "batch": 1, "length": 4}
    layers = product_key.compare_layers(2, "cpu", **small)
    monkeypatch.setattr(product_key, "compare_layers", lambda rounds, device: layers)
    monkeypatch.setattr(product_key, "compare_lookup", lambda rounds, device: layers)
    result = CliRunner().invoke(app, ["bench", "product_key", "--output", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "F.embedding_bag" in result.output and "p80" in result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["layers"] == layers and report["versions"]["torch"] and "not installed" in report
