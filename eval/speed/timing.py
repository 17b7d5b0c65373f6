"""What the benchmarks share: rounds in which every arm runs once, percentiles, and where it all ran."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version

import numpy as np
import torch
from rich.progress import track


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
