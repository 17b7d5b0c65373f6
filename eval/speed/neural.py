"""A neural memory layer beside its peers, and what it is built on alone, `chunk_memory`.

    OMP_NUM_THREADS=1 memlayers bench neural --ttt-lm ttt-lm-pytorch/ttt.py \\
        --output eval/speed/results/neural_cpu.json

`layers`: width 256, 4 heads of 64, chunks of 64, 2 × 1,024 tokens, float32, forward and backward to input and
parameters, projections included, all arms in every round. Peers are set as near to ours as their switches go:

* `titans-pytorch` (PyPI) with `chunk_size=64, batch_size=64`, as one would use it: gradients of a chunk at its first
  weights, every chunk starts from the last one's. Its step θ is one a token, but momentum, decay and the memory that
  is read are one a chunk, where ours are one a token: less work, and a coarser rule. `gates a token` has `chunk_size=1,
  batch_size=64`, which is exactly our rule (tests/eval/test_neural_benchmark.py) and makes the weights of every token;
  depth 1 only, for at depth 2 it takes about 13 GB. SiLU, norms of queries, keys and output as ours; norm of the input,
  norm and residual inside the memory off, since ours has none. It has no convolution, and one output gate a head where
  ours has one a channel.
* `ttt-lm TTTLinear` (github.com/test-time-training/ttt-lm-pytorch, on no package index: give the path of its `ttt.py`)
  with `mini_batch_size=64` beside our rule `ttt`. It has a norm and a residual inside the memory, rotary positions and
  an output gate; ours has convolutions. It is used as it is.

`peak MB` is what PyTorch holds at the most during one forward and backward pass, above input and parameters (see
`peak_memory`).

`core`: `chunk_memory` alone, see `memlayers.eval.speed.chunk_memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import memlayers as ml
from memlayers.eval.speed.chunk_memory import FLA, compare_core
from memlayers.eval.speed.timing import compare, installed, module_of, version_of, where

OURS = "memlayers"
TITANS, TTT = "titans-pytorch", "ttt-lm TTTLinear"
TITANS_ARMS = {  # depth, and whether momentum and decay are one a token
    f"{TITANS}, depth 1": (1, False),
    f"{TITANS}, depth 1, gates a token": (1, True),
    f"{TITANS}, depth 2": (2, False),
}
PEERS = {peer: f"{OURS}, titans, depth {depth}" for peer, (depth, _) in TITANS_ARMS.items()}
PEERS[TTT] = f"{OURS}, ttt, depth 1"
"""Each peer, and the arm of ours that does its work."""
MAX_STEP = 0.01  # of θ, so that no untrained memory grows without bound on random tokens


def layers(width: int, heads: int, chunk: int, device: str, ttt_lm: Path | None) -> dict[str, nn.Module]:
    """The layers that are compared, by name, each from x alone to y; a peer that is not there is left out."""
    torch.manual_seed(0)
    arms: dict[str, nn.Module] = {}
    for rule, depth in (("titans", 1), ("titans", 2), ("ttt", 1)):
        config = ml.NeuralMemoryConfig(
            rule=rule, depth=depth, expansion=4, heads=heads, chunk_size=chunk, theta_max=MAX_STEP
        )
        arms[f"{OURS}, {rule}, depth {depth}"] = _OutputAlone(ml.NeuralMemory(config, width))
    if installed(TITANS):
        for name, switches in TITANS_ARMS.items():
            arms[name] = _OutputAlone(titans_pytorch(width, heads, chunk, *switches))
    if ttt_lm is not None:
        arms[TTT] = _TTTLinear(ttt_lm, width, heads, chunk)
    return {name: layer.to(device) for name, layer in arms.items()}


class _OutputAlone(nn.Module):
    """x → y of a layer that gives (y, state)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def titans_pytorch(width: int, heads: int, chunk: int, depth: int, gates_a_token: bool) -> nn.Module:
    """The peer's layer, as near to ours as its switches go."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    return NeuralMemory(
        dim=width,
        chunk_size=1 if gates_a_token else chunk,
        batch_size=chunk,
        heads=heads,
        dim_head=width // heads,
        model=MemoryMLP(width // heads, depth, expansion_factor=4.0),
        activation=nn.SiLU(),
        qk_rmsnorm=True,
        post_rmsnorm=True,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
        default_step_transform_max_lr=MAX_STEP,
    )


class _TTTLinear(nn.Module):
    """ttt-lm-pytorch's linear layer from its file `ttt.py`, which imports under transformers 5 as it is."""

    def __init__(self, path: Path, width: int, heads: int, chunk: int):
        super().__init__()
        module = module_of(path)
        if not hasattr(module, "TTTLinear"):
            raise ValueError(f"{path} has no TTTLinear; give the ttt.py of ttt-lm-pytorch")
        config = module.TTTConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=1,
            mini_batch_size=chunk,
            use_gate=True,
        )
        self.layer = module.TTTLinear(config, layer_idx=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, position_ids=torch.arange(x.shape[1], device=x.device)[None])


def compare_layers(
    rounds: int, device: str, ttt_lm: Path | None, width=256, heads=4, chunk=64, batch=2, length=1024
) -> dict:
    """Forward and backward of every layer: milliseconds, peak memory, and every peer's over those of ours."""
    x = torch.randn(batch, length, width, device=device)
    direction = torch.randn_like(x)

    def run(layer: nn.Module) -> Callable[[], None]:
        def once():
            layer(x.clone().requires_grad_()).backward(direction)
            layer.zero_grad(set_to_none=True)

        return once

    arms = {name: run(layer) for name, layer in layers(width, heads, chunk, device, ttt_lm).items()}
    there = {peer: ours for peer, ours in PEERS.items() if peer in arms}
    work = f"width {width}, {heads} heads, chunks of {chunk}, {batch} × {length} tokens, forward and backward, float32"
    return compare(arms, there, rounds, device, work)


def benchmark(rounds: int = 20, device: str = "cpu", ttt_lm: Path | None = None) -> dict:
    """All of it, as the JSON that is committed. `ttt_lm`: the path of ttt-lm-pytorch's ttt.py.

    Raises:
        ValueError: `ttt_lm` is another file.
    """
    gpu = device.startswith("cuda")
    large = {"batch": 8, "heads": 16, "length": 4096, "dtype": torch.bfloat16} if gpu else {}
    packages = (TITANS, FLA) if gpu else (TITANS,)
    report = {
        "layers": compare_layers(rounds, device, ttt_lm),
        "core": compare_core(rounds, device, **large),
        **where(device, *filter(installed, packages)),
        "not installed": [name for name in packages if not installed(name)],
    }
    if ttt_lm is None:
        report["not installed"].append("ttt-lm-pytorch")
    else:
        report["versions"]["ttt-lm-pytorch"] = f"ttt.py, {version_of(ttt_lm)}"
    return report
