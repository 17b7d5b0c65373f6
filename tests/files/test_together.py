"""Several files of a folder change together: whole after any kill, and nobody else's file is touched."""

import os
import socket
import threading

import pytest

from memlayers.files import DamagedFile, holding_folder, read_json, settle, together, write_json, write_text
from memlayers.files.together import DECIDED, FILES, JOURNAL
from tests.killing import contents, kill_at_random_moments, run_child

THEIRS = {"notes.txt": b"mine", "base/thesis.pdf": b"mine too"}


def put(folder, version, *, names=("config.json", "w.json", "base/model.json"), remove=()):
    with together(folder) as change:
        for name in names:
            write_json(change.new / name, {"version": version, "filler": "x" * 20_000})
        change.remove += remove


def versions(folder):
    """Of the files in their places; what an undecided change left is in none."""
    files = [path for path in sorted(folder.rglob("*.json")) if DECIDED not in str(path)]
    return {path.name: read_json(path)["version"] for path in files}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "out"
    put(place, 1)
    for name, data in THEIRS.items():
        (place / name).write_bytes(data)
    return place


def is_untouched(folder):
    return {name: (folder / name).read_bytes() for name in THEIRS} == THEIRS


def test_all_files_are_new_and_those_of_others_stay(folder):
    put(folder, 2, names=("config.json", "base/model.json", "deep/er/x.json"), remove=["w.json", "not-there"])
    assert versions(folder) == {"config.json": 2, "model.json": 2, "x.json": 2}
    assert is_untouched(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(DECIDED)]


def test_a_folder_that_is_empty_after_a_removal_goes_and_one_with_others_in_it_stays(folder):
    put(folder, 2, names=("alone/x.json",))
    put(folder, 3, names=("config.json",), remove=["alone/x.json", "base/model.json"])
    assert not (folder / "alone").exists()
    assert is_untouched(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_error_on_the_way_changes_nothing(folder, error):
    before = contents(folder)
    with pytest.raises(error), together(folder) as change:
        write_json(change.new / "config.json", {"version": 2})
        raise error("stop")
    assert contents(folder) == before


def test_killed_at_any_moment_it_is_old_or_new(tmp_path):
    place = tmp_path / "out"

    def prepare():
        put(place, 1)
        for name, data in THEIRS.items():
            (place / name).write_bytes(data)

    def check():
        settle(place)
        found = set(versions(place).values())
        assert len(found) == 1 and is_untouched(place)
        assert not (place / DECIDED).exists()
        return "new" if found == {2} else "old"

    found = kill_at_random_moments(prepare, lambda: put(place, 2), check)
    assert found.get("old", 0) + found.get("new", 0) >= 1


def test_a_process_that_dies_at_each_file_operation_leaves_old_or_new(folder):
    """The kill, at every place and not at random: each of the operations that change names ends the process in turn."""
    found = []
    for at in range(200):
        for name in ("config.json", "w.json", "base/model.json"):
            write_json(folder / name, {"version": 1})

        def dies(at=at):
            count = 0

            def after(function):
                def wrapped(*args, **options):
                    nonlocal count
                    count += 1
                    if count > at:
                        os._exit(7)
                    return function(*args, **options)

                return wrapped

            for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "chmod"):
                setattr(os, name, after(getattr(os, name)))
            put(folder, 2)

        status = run_child(dies)
        settle(folder)
        assert len(set(versions(folder).values())) == 1 and is_untouched(folder)
        found.append(versions(folder)["config.json"])
        put(folder, 1)  # clears what an undecided change left
        assert sorted(contents(folder)) == [
            "base",
            "base/model.json",
            "base/thesis.pdf",
            "config.json",
            "notes.txt",
            "w.json",
        ]
        if status == 0:
            break
    assert status == 0 and found == sorted(found) and set(found) == {1, 2}


def test_what_is_not_of_an_interrupted_change_is_left_and_told(folder):
    (folder / DECIDED).mkdir()
    (folder / DECIDED / "photo.jpg").write_bytes(b"mine")
    undecided = folder / f"{DECIDED}-0123456789abcdef"
    undecided.mkdir()
    (undecided / "photo.jpg").write_bytes(b"mine")
    before = contents(folder)
    for act in (lambda: settle(folder), lambda: put(folder, 2)):
        with pytest.raises(DamagedFile, match="no folder of an interrupted save"):
            act()
    assert contents(folder) == before
    os.rename(folder / DECIDED, folder / "elsewhere")
    put(folder, 2)
    assert (undecided / "photo.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../theirs", "/etc/hostname", "a/../../theirs", "", ".memlayers-new/x"])
def test_a_hostile_journal_reaches_nothing_outside(folder, name):
    (folder.parent / "theirs").write_text("precious")
    decided = folder / DECIDED
    (decided / FILES).mkdir(parents=True)
    write_json(decided / JOURNAL, {"files": [], "remove": [name]})
    with pytest.raises(DamagedFile):
        settle(folder)
    assert (folder.parent / "theirs").read_text() == "precious"


def test_links_and_what_is_no_file_are_not_followed_or_replaced(folder, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "model.json").write_text("precious")
    (folder / "linked").symlink_to(theirs)
    (folder / "folder.json").mkdir()
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="linked is a link"):
        put(folder, 2, names=("linked/model.json",))
    with pytest.raises(IsADirectoryError, match=r"folder\.json"):
        put(folder, 2, names=("folder.json",))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        with pytest.raises(FileExistsError, match="socket"):
            put(folder, 2, names=("socket",))
        os.unlink(folder / "socket")
    assert contents(tmp_path) == before


def test_files_keep_their_modes(folder):
    (folder / "w.json").chmod(0o600)
    put(folder, 2)
    assert (folder / "w.json").stat().st_mode & 0o777 == 0o600


def test_who_reads_waits_for_who_writes(folder):
    """A reader that holds the folder keeps the change out until it is done."""
    writer = threading.Thread(target=put, args=(folder, 2))
    with holding_folder(folder, shared=True):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert set(versions(folder).values()) == {1}
    writer.join()
    assert set(versions(folder).values()) == {2}


def test_texts_are_written_too(folder):
    with together(folder) as change:
        write_text(change.new / "README.md", "hello")
    assert (folder / "README.md").read_text() == "hello"
