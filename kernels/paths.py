"""Which path of a kernel family runs: the one place where that is decided.

Order: the argument `path`, then the environment variable MEMLAYERS_KERNELS, then the device of the tensors.
"""

from __future__ import annotations

import importlib.util
import os

import torch

PATHS = ("reference", "cpu", "triton")
VARIABLE = "MEMLAYERS_KERNELS"
BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}  # any other device: the reference, which is plain torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU (set before triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(family: str, device: torch.device, path: str | None = None, closed: bool = False) -> str:
    """The path that `family` takes for tensors on `device`: "reference", "cpu" or "triton".

    `closed`: the family's path "cpu" is a closed form in plain torch, which runs on any device and is what devices
    without a path of their own take.

    ValueError, saying what is there, for an unknown name and for a path that cannot run here: "cpu" for
    tensors elsewhere, "triton" where triton is not installed, or for tensors that are not on a GPU unless
    TRITON_INTERPRET=1.
    """
    asked = "path"
    if path is None:
        asked, path = VARIABLE, os.environ.get(VARIABLE) or None
    if path is None:
        asked, path = f"device {device.type}", BY_DEVICE.get(device.type, "cpu" if closed else "reference")
    if path not in PATHS:
        raise ValueError(f"{family}: {asked} is {path!r}; the paths are {', '.join(PATHS)}")
    if path == "cpu" and device.type != "cpu" and not closed:
        raise ValueError(
            f"{family}: the path 'cpu' ({asked}) is for tensors on the CPU, these are on {device}"
        )
    if path == "triton" and not TRITON_INSTALLED:
        raise ValueError(
            f"{family}: the path 'triton' ({asked}) needs triton, which is not installed; "
            "pip install triton, or take the path 'reference'"
        )
    if path == "triton" and device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise ValueError(
            f"{family}: the path 'triton' ({asked}) needs tensors on a GPU, these are on {device}; "
            "set TRITON_INTERPRET=1 to run it in Triton's interpreter on the CPU"
        )
    return path
