"""A full disk, and a limit on the size of files: a clear error, the old content, nothing left over."""

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from memlayers.files import read_json, read_tensors, settle, together, write_json, write_tensors, write_text
from tests.disks import mounted_disk
from tests.killing import contents, run_child

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 600 KB."""
    with mounted_disk(tmp_path / "disk") as place:
        yield place


def texts(path):
    write_text(path, "x" * MIB)


def tensors(path):
    write_tensors(path, {"w": torch.randn(MIB // 4)}, {"format": "pt"})


WRITERS = pytest.mark.parametrize("write", [texts, tensors])


@WRITERS
def test_a_full_disk_is_told_and_the_old_file_stands(small_disk, write):
    (small_disk / "a").write_bytes(b"old")
    with pytest.raises(OSError, match=r"cannot write .*disk/a: No space left on device") as told:
        write(small_disk / "a")
    assert told.value.errno == errno.ENOSPC
    assert contents(small_disk) == {"a": b"old"}
    write_text(small_disk / "b", "x" * 400_000)  # the room is there again


def test_a_change_of_several_files_on_a_full_disk_changes_none(small_disk):
    write_json(small_disk / "config.json", {"version": 1})
    write_tensors(small_disk / "w.safetensors", {"w": torch.ones(1000)}, {})
    before = contents(small_disk)
    with (
        pytest.raises(OSError, match=r"cannot write .*: No space left on device"),
        together(small_disk) as change,
    ):
        write_json(change.new / "config.json", {"version": 2})
        write_tensors(change.new / "w.safetensors", {"w": torch.randn(MIB // 4)}, {})
    assert contents(small_disk) == before
    assert read_json(small_disk / "config.json") == {"version": 1}


@WRITERS
def test_a_limit_on_the_size_of_files_is_told(tmp_path, write):
    (tmp_path / "a").write_bytes(b"old")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=r"cannot write .*/a: File too large") as told:
            write(tmp_path / "a")
        assert told.value.errno == errno.EFBIG

    assert run_child(limited) == 0
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_told(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="cannot write"):
        write_text(tmp_path / "a", "new")
    tmp_path.chmod(0o755)


def test_a_read_only_disk_is_told(small_disk):
    write_json(small_disk / "a.json", {"version": 1})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"cannot write .*: Read-only file system"):
        write_json(small_disk / "a.json", {"version": 2})
    with (
        pytest.raises(OSError, match=r"cannot write .*: Read-only file system"),
        together(small_disk) as change,
    ):
        write_text(change.new / "b", "new")
    assert read_json(small_disk / "a.json") == {"version": 1}


@pytest.mark.parametrize("write", [tensors])
def test_what_was_written_before_the_limit_can_be_read(tmp_path, write):
    write(tmp_path / "a")
    before = {name: tensor.clone() for name, tensor in read_tensors(tmp_path / "a")[0].items()}

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "a")

    assert run_child(limited) == 0
    assert torch.equal(read_tensors(tmp_path / "a")[0]["w"], before["w"])


def test_an_interrupted_change_on_a_read_only_disk_is_told(small_disk, monkeypatch):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["memlayers.files.together"], "_apply", stop)
    with pytest.raises(KeyboardInterrupt), together(small_disk) as change:
        write_json(change.new / "a.json", {"version": 2})
    monkeypatch.undo()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"holds a save that was interrupted .*Read-only file system"):
        settle(small_disk)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    settle(small_disk)
    assert read_json(small_disk / "a.json") == {"version": 2}
