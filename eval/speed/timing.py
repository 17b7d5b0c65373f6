"""What the benchmarks share: rounds in which every arm runs once, percentiles, peak memory, where it all ran."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from rich.progress import track
from torch.profiler import ProfilerActivity, profile


def time_rounds(
    arms: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> dict[str, np.ndarray]:
    """Seconds of every arm in every round, (rounds,) each.

    In each round every arm runs once, in turn, so that what else runs on the machine meets them all.
    """
    seconds = {name: [] for name in arms}
    for number in track(range(warm_up + rounds), description="rounds", transient=True):
        for name, arm in arms.items():
            _wait()
            started = time.perf_counter()
            arm()
            _wait()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(found) for name, found in seconds.items()}


def percentiles(values: np.ndarray) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes that PyTorch holds at the most while `run` runs, above what it holds before.

    On a CPU by the profiler's record of every allocation: exact, and the same in every run. What libraries under
    PyTorch take for themselves is not in it, nor what the system's allocator rounds up.
    """
    if device.startswith("cuda"):
        _wait()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write to stderr when it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]
    )
    return max(itertools.accumulate((change["args"]["Bytes"] for change in changes), initial=0))


def peak_memories(arms: Mapping[str, Callable[[], None]], device: str) -> dict[str, int]:
    """`peak_memory` of every arm, the second time that it runs: what the first call makes for good does not count."""
    peaks = {}
    for name, arm in arms.items():
        arm()
        peaks[name] = peak_memory(arm, device)
    return peaks


def compare(
    arms: Mapping[str, Callable[[], None]], ours: Mapping[str, str], rounds: int, device: str, work: str
) -> dict:
    """A part of a report: milliseconds and peak memory of every arm, and how many times those of ours each peer takes,
    in the same round. `ours`: each peer, and the arm of ours that does its work."""
    peaks = peak_memories(arms, device)
    seconds = time_rounds(arms, rounds)
    return {
        "work": work,
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        "times ours": {peer: percentiles(seconds[peer] / seconds[own]) for peer, own in ours.items()},
        "peak MB": {name: peak / 1e6 for name, peak in peaks.items()},
        "peak over ours": {peer: peaks[peer] / peaks[own] for peer, own in ours.items()},
    }


def module_of(path: Path) -> ModuleType:
    """The Python file of a peer that is on no package index, imported."""
    spec = importlib.util.spec_from_file_location(f"memlayers_bench_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def version_of(path: Path) -> str:
    """What stands for the version of such a file."""
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def installed(package: str) -> bool:
    """Whether pip knows `package` here."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def where(device: str, *packages: str) -> dict:
    """Device, threads, load and versions, for a report."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {platform.system()}, {os.cpu_count()} CPU cores"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "memlayers", *packages)},
        },
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
