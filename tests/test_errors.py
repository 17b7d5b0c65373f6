"""What a command says of an error from outside: what it is, and not that memlayers has a defect."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from memlayers.config import ConfigError
from memlayers.errors import paragraph

OUTSIDE = [
    OSError(errno.ENOSPC, "No space left on device", "/x/memory.safetensors"),
    OSError(errno.EFBIG, "File too large", "/x/memory.safetensors"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ConfigError("r: too large"),
    KeyError("no memory named 'x'"),
]


@pytest.mark.parametrize("error", OUTSIDE, ids=lambda error: type(error).__name__)
def test_what_comes_from_outside_is_no_defect(error):
    told = paragraph(error)
    assert told and "defect" not in told and "\n" not in told


def test_what_comes_from_inside_is_one():
    assert paragraph(AttributeError("'list' has no 'items'")).endswith(
        "This is a defect of memlayers or of a library under it."
    )


def test_every_terminal_takes_it():
    assert paragraph(ValueError("a name \ud800")) == "a name \\ud800"
