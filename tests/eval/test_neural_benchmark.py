"""The benchmark of neural memory: every arm learns, sizes and ratios are what they say, the command writes them."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memlayers.cli import app
from memlayers.eval.speed import chunk_memory as core
from memlayers.eval.speed import neural
from memlayers.kernels.chunk_memory import ChunkState, chunk_memory

SMALL = {"width": 16, "heads": 2, "chunk": 4}
SMALL_CORE = {"batch": 1, "heads": 2, "length": 8, "dim": 4, "chunk": 4}
TTT_LM = """
import torch

class TTTConfig:
    def __init__(self, **fields):
        vars(self).update(fields)

class TTTLinear(torch.nn.Linear):
    def __init__(self, config, layer_idx):
        super().__init__(config.hidden_size, config.hidden_size)
        self.config = config

    def forward(self, x, position_ids):
        assert position_ids.tolist() == [list(range(x.shape[1]))]
        return super().forward(x)
"""


@pytest.fixture
def ttt_lm(tmp_path):
    """A file with the interface of ttt-lm-pytorch's `ttt.py`."""
    path = tmp_path / "ttt.py"
    path.write_text(TTT_LM)
    return path


def test_every_layer_gives_and_takes_gradients(ttt_lm):
    arms = neural.layers(**SMALL, device="cpu", ttt_lm=ttt_lm)
    assert set(neural.PEERS.values()) | {neural.TTT} <= set(arms)
    assert arms[neural.TTT].layer.config.mini_batch_size == 4
    for name, layer in arms.items():
        x = torch.randn(2, 12, 16, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert y.shape == x.shape and y.isfinite().all() and x.grad.isfinite().all(), name
        unused = {n for n, p in layer.named_parameters() if p.grad is None}
        assert all("memory_model.weights" in n for n in unused), (
            name
        )  # titans-pytorch's template of its memory


@pytest.mark.parametrize("depth", [1, 2])
def test_titans_pytorch_with_gates_a_token_is_our_rule(depth):
    """Its memory, fed with its own keys, values, queries and gates, reads what `chunk_memory` reads, over chunks."""
    pytest.importorskip("titans_pytorch")
    width = 8
    peer = neural.titans_pytorch(2 * width, 2, chunk=4, depth=depth, gates_a_token=True).double()
    peer.retrieve_gate, peer.combine_heads, peer.multihead_rmsnorm = (
        None,
        torch.nn.Identity(),
        torch.nn.Identity(),
    )
    peer.adaptive_step_transform = lambda x: x.sigmoid()
    x = torch.randn(3, 14, 2 * width, dtype=torch.float64)
    q, k, v = (
        project(x).unflatten(-1, (2, width)).transpose(1, 2)
        for project in (peer.to_queries, peer.to_keys, peer.to_values)
    )
    gates = (peer.to_adaptive_step(x), peer.to_momentum(x), peer.to_decay_factor(x))
    theta, eta, alpha = (gate.sigmoid().view(3, 2, 14) for gate in gates)
    weights = tuple(w.expand(3, *w.shape) for w in peer.memory_model_parameters)
    state = ChunkState(weights, tuple(torch.zeros_like(w) for w in weights), weights)
    y, _ = chunk_memory(
        peer.q_norm(q), peer.k_norm(k), v, theta / width, eta, alpha, state, chunk_size=4
    )  # its loss is a mean over the width
    torch.testing.assert_close(peer(x)[0], y.transpose(1, 2).flatten(2), rtol=1e-10, atol=1e-10)


def test_rounds_ratios_and_peaks(ttt_lm):
    part = neural.compare_layers(3, "cpu", ttt_lm, **SMALL, batch=1, length=8)
    peers = set(neural.PEERS) & set(part["ms"])
    assert neural.TTT in peers and part["rounds"] == 3
    assert set(part["times ours"]) == set(part["peak over ours"]) == peers
    assert set(part["peak MB"]) == set(part["ms"]) and min(part["peak MB"].values()) > 0
    for cells in (part["ms"], part["times ours"]):
        assert all(0 < cell["p20"] <= cell["p50"] <= cell["p80"] for cell in cells.values())


def test_a_file_that_is_not_ttt_lm_is_refused(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"other\.py has no TTTLinear"):
        neural.layers(**SMALL, device="cpu", ttt_lm=other)


def test_the_core_is_timed_alone():
    part = core.compare_core(2, "cpu", **SMALL_CORE)
    assert {
        f"{name}, closed form: {p}" for name in core.CORES for p in ("forward", "forward and backward")
    } == set(part["ms"])
    assert len(part["peak MB"]) == len(core.CORES)


def test_flash_linear_attention_is_asked_for_the_same_function(monkeypatch):
    """Its recurrence, as its documentation states it, in place of its kernels: the same y as our rule `delta`."""

    def recurrence(q, k, v, g, beta, scale, initial_state, output_final_state):
        memory, outputs = initial_state, []
        for t in range(q.shape[1]):
            memory = g[:, t, :, None, None].exp() * memory
            missing = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], memory)
            memory = memory + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], missing)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
        return torch.stack(outputs, 1), memory

    module = SimpleNamespace(chunk_gated_delta_rule=recurrence)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    sizes = (2, 3, 8, 4)
    torch.manual_seed(0)
    theirs, leaves, direction = core._fla(*sizes, torch.float32, "cpu")
    torch.manual_seed(0)
    ours, _, _ = core._chunk_memory(*sizes, 4, torch.float32, "cpu", "token", 1, "cpu")
    torch.testing.assert_close(theirs().transpose(1, 2), ours())
    assert len(torch.autograd.grad(theirs(), leaves, direction)) == 6


def test_bytes_that_must_move():
    """Heads of 64 in bf16, chunks of 64: a kilobyte a token, half of it the state."""
    sizes = {"dim": 64, "chunk": 64, "itemsize": 2}
    assert core.bytes_moved("chunk", 1, part="forward", **sizes) == 4 * 128 + 12 + 2 * 64 * 64 * 4 / 64
    assert core.bytes_moved("token", 1, part="forward", **sizes) == 4 * 128 + 8 + 64 * 64 * 4 / 64
    both = core.bytes_moved("chunk", 2, part="forward and backward", **sizes)
    assert both == 11 * 128 + 36 + 2 * 2 * 8 * 64 * 64 * 4 / 64


def test_figures_of_a_gpu():
    """A Triton path that moves 1 KB a token as fast as the copy has share 1; a path twice as slow is 2."""
    size = {"batch": 2, "heads": 3, "length": 10, "dim": 64, "chunk": 64, "dtype": torch.bfloat16}
    moved = 60 * core.bytes_moved("chunk", 1, 64, 64, 2, "forward")
    second = np.ones(3)
    seconds = {
        "titans, depth 1, triton: forward": second,
        "titans, depth 1, closed form: forward": 2 * second,
        "delta, depth 1, triton: forward": second,
        "flash-linear-attention: forward": 3 * second,
        "copy": second,
    }
    found = core._gpu_figures(seconds, **size, copied=moved)
    assert found["share of copy"]["titans, depth 1, triton: forward"]["p50"] == pytest.approx(1)
    assert found["million tokens/s"]["titans, depth 1, closed form: forward"]["p50"] == pytest.approx(10e-6)
    over = {name: cell["p50"] for name, cell in found["times triton"].items()}
    assert over == {"titans, depth 1, closed form: forward": 2, "flash-linear-attention: forward": 3}


def test_the_command_prints_and_writes(tmp_path, monkeypatch, ttt_lm):
    layers = neural.compare_layers(2, "cpu", ttt_lm, **SMALL, batch=1, length=4)
    alone = core.compare_core(2, "cpu", **SMALL_CORE)
    monkeypatch.setattr(neural, "compare_layers", lambda rounds, device, ttt_lm: layers)
    monkeypatch.setattr(neural, "compare_core", lambda rounds, device: alone)
    output = tmp_path / "out.json"
    arguments = ["bench", "neural", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--ttt-lm", str(ttt_lm)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "TTTLinear" in result.output and "peak MB" in result.output and "closed form" in result.output
    report = json.loads(output.read_text())
    assert report["layers"] == layers and report["core"] == alone and "load_average" in report
    assert "ttt-lm-pytorch" in report["versions"] and "ttt-lm-pytorch" not in report["not installed"]

    result = CliRunner().invoke(app, arguments, env={"MEMLAYERS_TTT_LM": "", "COLUMNS": "200"})
    assert result.exit_code == 0 and "ttt-lm-pytorch" in result.output.partition("not installed")[2]
    missing = {"MEMLAYERS_TTT_LM": str(tmp_path / "none.py"), "COLUMNS": "400"}
    result = CliRunner().invoke(app, arguments, env=missing)
    assert result.exit_code == 2 and "does not exist" in result.output
    assert "none.py" in "".join(result.output.replace("│", "").split())  # wherever the box breaks the path
