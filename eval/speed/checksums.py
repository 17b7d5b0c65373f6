"""What checksums cost: saving and loading 500 MB with them and without.

    OMP_NUM_THREADS=1 memlayers bench checksums --output eval/speed/results/checksums_cpu.json

Three works: a memory (tables of a product-key memory on a tiny base), a base that is saved with its memory, and a state.
`without` is the same code with functions in the place of the checksums that look at nothing, and `verify=False`. Files lie
where temporary files do; what is written is on disk when a call returns, and is read from the system's cache. A model is
loaded when it has answered once: transformers leaves the base's tensors in the file until they are used.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import memlayers as ml
from memlayers.eval.speed.timing import percentiles, time_rounds, where

WIDTH = 1024  # tensors so large that an allocator takes each anew, in every arm
SLOTS, VALUES = 512, 480  # 512² slots of 480 float32 numbers: 503 MB
MEMORY = ml.ProductKeyMemoryConfig(layers=[-1], n_keys=SLOTS, heads=1, top_k=4, key_dim=16, value_dim=VALUES)
SMALL = ml.MemoryTokensConfig(n_tokens=4, segment_length=16)
PATCHED = {
    "memlayers.files.tensors._look": ("0" * 32, True),
    "memlayers.core.state.check_finite": None,
    "memlayers.checkpoint.saving.file_checksum": "",
    "memlayers.checkpoint.contents.file_checksum": "",
    "memlayers.adapters.file_checksum": "",
}
"""Functions that look at all of a file or tensor, and what one that looks at nothing gives instead."""


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """No checksum is made and no number looked at."""
    with contextlib.ExitStack() as stack:
        for name, result in PATCHED.items():
            stack.enter_context(patch(name, lambda *args, found=result: found))
        yield


def base(layers: int, width: int) -> PreTrainedModel:
    """A random Llama."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=512, num_attention_heads=4, max_position_embeddings=64)
    )


@torch.no_grad()
def answer(folder: Path, verify: bool) -> None:
    """Load a model and call it."""
    ml.load(folder, verify=verify)(torch.arange(32)[None])


def with_memory(model: PreTrainedModel, config: ml.MemoryConfig) -> PreTrainedModel:
    ml.attach(model, config, name="m")
    return model


def both(save: Callable[[Path], object], load: Callable[[Path, bool], object], folder: Path) -> dict:
    """The arms: saving and loading, each with checksums and without; each has files of its own."""

    def plain(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with without_checksums():
                call()

        return run

    ours, theirs = folder / "with", folder / "without"
    return {
        "save": lambda: save(ours),
        "save, without": plain(lambda: save(theirs)),
        "load": lambda: load(ours, True),
        "load, without": plain(lambda: load(theirs, False)),
    }


def works(folder: Path) -> Iterator[tuple[str, str, dict]]:
    """Name, description and arms."""
    small = folder / "small"
    base(1, 64).save_pretrained(small)
    model = with_memory(LlamaForCausalLM.from_pretrained(small), MEMORY)
    yield (
        "memory",
        f"ml.save and ml.load, product keys, {SLOTS * SLOTS * VALUES * 4 / 1e6:.0f} MB",
        both(lambda at: ml.save(model, at), answer, folder / "memory"),
    )
    large = with_memory(base(11, 768), SMALL)
    size = sum(p.nbytes for p in large.parameters()) / 1e6
    yield (
        "base",
        f"ml.save with save_base and ml.load, a base of {size:.0f} MB",
        both(lambda at: ml.save(large, at, save_base=True), answer, folder / "base"),
    )
    state = ml.MemoryState({"m": {f"layers.{i}.matrix": torch.randn(1, WIDTH, 12_000) for i in range(10)}})
    (folder / "state").mkdir()
    yield (
        "state",
        f"MemoryState.save and load, {state.nbytes / 1e6:.0f} MB",
        both(state.save, lambda at, verify: ml.MemoryState.load(at, verify=verify), folder / "state"),
    )


def benchmark(rounds: int, device: str) -> dict:
    """Milliseconds of every arm, and how many times as long each takes as without, in the same round."""
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, work, arms in works(Path(folder)):
            seconds = time_rounds(arms, rounds)
            report[name] = {
                "work": work,
                "rounds": rounds,
                "ms": {arm: percentiles(1e3 * found) for arm, found in seconds.items()},
                "times without": {
                    arm: percentiles(seconds[arm] / seconds[f"{arm}, without"]) for arm in ("save", "load")
                },
            }
    return {**report, **where(device), "not installed": []}
