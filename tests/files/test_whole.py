"""A file is the old one or the new one: modes, links, what stands at its place, and what a failure leaves."""

import os
import socket
import stat

import pytest
import torch

from memlayers.files import make_folder, read_tensors, whole, write_tensors, write_text, write_whole
from tests.killing import contents, run_child


def mode(path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask, mask, expected):
    umask(mask)
    write_text(tmp_path / "a.json", "new")
    assert mode(tmp_path / "a.json") == expected


@pytest.mark.parametrize("own", [0o600, 0o640, 0o666, 0o444])
def test_a_file_that_is_there_keeps_its_mode(tmp_path, umask, own):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "a.json").chmod(own)
    write_text(tmp_path / "a.json", "new")
    assert mode(tmp_path / "a.json") == own
    assert (tmp_path / "a.json").read_text() == "new"


def test_the_temporary_file_is_no_more_readable_than_the_file_it_replaces(tmp_path, umask):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o600)
    write_whole(tmp_path / "a", lambda path: seen.append(mode(path)) or path.write_text("new")) if (
        seen := []
    ) is not None else None
    assert seen == [0o600]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "theirs")
    write_text(tmp_path / "a", "new")
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "theirs").read_text() == "precious"


def test_the_other_name_of_a_file_keeps_its_contents(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    os.link(tmp_path / "theirs", tmp_path / "a")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "theirs").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new"


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, error in (
            ("folder", IsADirectoryError),
            ("pipe", FileExistsError),
            ("socket", FileExistsError),
        ):
            with pytest.raises(error, match=name):
                write_text(tmp_path / name, "new")
        assert stat.S_ISSOCK(os.lstat(tmp_path / "socket").st_mode)
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)
    with pytest.raises(FileExistsError, match="/dev/null"):
        write_text("/dev/null", "new")


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        make_folder(tmp_path / "file" / "deep" / "deeper")
    assert (tmp_path / "file").read_text() == "theirs"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError, ValueError])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "a", "old")

    def half(path):
        path.write_text("ne")
        raise error("stop")

    with pytest.raises(error):
        write_whole(tmp_path / "a", half)
    assert contents(tmp_path) == {"a": b"old"}


def test_what_a_killed_process_left_goes_and_what_others_hold_stays(tmp_path):
    own = tmp_path / ".a.memlayers-0123456789abcdef.tmp"
    own.write_text("half")
    folder = tmp_path / ".a.memlayers-0123456789abcde0.tmp"
    folder.mkdir()
    link = tmp_path / ".a.memlayers-0123456789abcde1.tmp"
    link.symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").write_text("precious")
    twice = tmp_path / ".a.memlayers-0123456789abcde2.tmp"
    os.link(tmp_path / "theirs", twice)
    others = [
        tmp_path / ".a.tmp",
        tmp_path / ".a.memlayers-xyz.tmp",
        tmp_path / ".b.memlayers-0123456789abcdef.tmp",
    ]
    for other in others:
        other.write_text("theirs")
    held = tmp_path / ".a.memlayers-0123456789abcde3.tmp"
    held.write_text("of a process that lives")
    with open(held) as file:
        whole._lock(file.fileno())
        write_text(tmp_path / "a", "new")
        assert held.exists()
    assert not own.exists()
    assert folder.is_dir() and link.is_symlink() and twice.read_text() == "precious"
    assert [other.read_text() for other in others] == ["theirs"] * 3


def test_a_long_name_can_be_written(tmp_path):
    write_text(tmp_path / ("x" * 250), "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 250]


def test_names_and_contents_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    """By the order of calls: the file, the rename, the folder; new folders' names too."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    write_text(tmp_path / "one" / "two" / "a", "new")
    at = calls.index("replace")
    assert calls[:at][:2] == [str(tmp_path / "one"), str(tmp_path)]
    assert ".a.memlayers-" in calls[at - 1]
    assert calls[at + 1 :] == [str(tmp_path / "one" / "two")]


def test_a_forked_process_reads_and_writes_tensors(tmp_path):
    """Also where its parent has set torch's threads, so that torch works in no new thread of the child."""
    before = torch.get_num_threads()
    torch.set_num_threads(before)

    def both():
        write_tensors(tmp_path / "a", {"w": torch.ones(1000)}, {})
        read_tensors(tmp_path / "a", device="cpu")

    assert run_child(both) == 0
