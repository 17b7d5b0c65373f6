"""What a command says of an error from outside: what it is, and not that memlayers has a defect."""

import errno

import pytest
import torch
from safetensors import SafetensorError
from test_cli import run

import memlayers as ml
from memlayers.cli.common import packaged
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


HOSTILE = [
    b"model: \xff",
    b"a: " + b"[" * 20_000,
    b"1: x",
    b"memories: {m: {type: [x]}}",
    b"memories: 5",
    b"",
    b"\0",
    b"- a",
]


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("command", ["train", "eval", "wrap"])
def test_a_hostile_config_is_one_paragraph(tmp_path, command, raw):
    path = tmp_path / "bad.yaml"
    path.write_bytes(raw)
    rest = [tmp_path / "base", "--out", tmp_path / "out"] if command == "wrap" else []
    code, _, err = run(command, "--config", path, *rest)
    assert code == 1 and "Traceback" not in err and "defect" not in err
    assert "bad.yaml" in err or "model" in err or "memories" in err


def test_a_full_disk_is_no_defect(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(ml, "save", full)
    (tmp_path / "m.yaml").write_text("memories: {m: {type: tokens, n_tokens: 2, segment_length: 16}}")
    code, _, err = run("wrap", packaged("demo/base"), "-c", tmp_path / "m.yaml", "-o", tmp_path / "out")
    assert code == 1 and "No space left on device" in err and "defect" not in err


@pytest.mark.parametrize(("module", "extra"), [("datasets", "train"), ("scipy", "eval")])
def test_an_extra_that_is_missing_is_named(module, extra):
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert paragraph(error) == f"{module} is not installed: pip install 'memlayers[{extra}]'"
