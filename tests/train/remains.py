"""What two runs must have left alike, whatever happened to one of them on its way."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load

from memlayers.train.resume import complete_checkpoints


def remains(out: Path) -> dict[str, object]:
    """Everything that must be equal: log, newest checkpoint, final model. Configs differ in output_dir; the order of metadata in safetensors files is not fixed, their tensors are."""
    newest = complete_checkpoints(out / "checkpoints")[-1]
    files = [out / "log.jsonl", *newest.iterdir(), *(p for p in (out / "final").rglob("*") if p.is_file())]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    for name, content in found.items():
        if name.endswith(".safetensors"):
            found[name] = {key: plain(tensor) for key, tensor in load(content).items()}
        elif name.endswith(("state.json", "memory_config.json")):
            data = json.loads(content)
            found[name] = str({**data, "config": None}).replace(str(out), "OUT")
    return {name: content for name, content in found.items() if not name.endswith("COMPLETE")}


def plain(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(a: Path, b: Path) -> None:
    one, two = remains(a), remains(b)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
