"""Saves that are killed, or that find a full disk, links or files of others: the old one or the new one stands, whole."""

import errno
import math
import os
import resource
import socket
import subprocess
import sys

import pytest
import torch
from matrix import llama, says, tokens

import memlayers as ml
from memlayers.files import DamagedFile, read_json
from memlayers.files.together import DECIDED
from tests.disks import mounted_disk
from tests.killing import contents, kill_at_random_moments, run_child

THEIRS = {
    "notes.txt": b"mine",
    "base/thesis.pdf": b"mine too",
    "adapters/x/y": b"and this",
    f"{DECIDED}-0123456789abcdef/letter.txt": b"dear",
}


def model_of(version: int):
    """A model whose base and memory say which version they are of: all numbers are 2 to its power times what they were."""
    torch.manual_seed(0)
    model = llama().base()
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=5), name="stream")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0**version)
    return model


def versions(model) -> dict[str, int]:
    """The version of each tensor."""
    start, found = dict(model_of(0).named_parameters()), {}
    for name, parameter in model.named_parameters():
        ratio = (parameter / start[name])[start[name] != 0].unique().tolist()
        assert len(ratio) == 1, (name, ratio)
        found[name] = int(math.log2(ratio[0]))
    return found


def version_of(folder) -> int:
    """Which one is loaded; all tensors have to be of the same."""
    found = set(versions(ml.load(folder)).values())
    assert len(found) == 1, found
    return found.pop()


def put_theirs(folder):
    for name, data in THEIRS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def check_theirs(folder):
    assert {name: (folder / name).read_bytes() for name in THEIRS} == THEIRS


def unmount(place):
    """Once nobody uses it: the tensors of a base that is loaded stay in its file."""
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def folder(tmp_path):
    """The first version, with its base, and files of others."""
    ml.save(model_of(1), tmp_path / "out", save_base=True)
    put_theirs(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 600 KB."""
    with mounted_disk(tmp_path / "disk") as place:
        yield place


# killed


def test_a_save_that_is_killed(folder):
    first, second = model_of(1), model_of(2)

    def check():
        found = version_of(folder)
        check_theirs(folder)
        assert not (folder / DECIDED).exists()  # loading has brought it to its end
        return {1: "old", 2: "new"}[found]

    found = kill_at_random_moments(
        lambda: ml.save(first, folder, save_base=True),
        lambda: ml.save(second, folder, save_base=True),
        check,
    )
    print(found)
    ml.save(second, folder, save_base=True)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == [f"{DECIDED}-0123456789abcdef"]


def test_a_state_whose_saving_is_killed(tmp_path):
    path = tmp_path / "alice.safetensors"
    old, new = (ml.MemoryState({"m": {"x": torch.full((1, 4_000_000), float(v))}}) for v in (1, 2))

    def check():
        return {1: "old", 2: "new"}[int(ml.MemoryState.load(path)["m"]["x"].unique().item())]

    print(kill_at_random_moments(lambda: old.save(path), lambda: new.save(path), check))
    old.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_several_processes_save_at_once(folder):
    """As the ranks of a training do: each save is whole, and the last one stands."""
    models = {version: model_of(version) for version in (2, 3, 4)}

    def saves():
        children = []
        for version, model in models.items():
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    for _ in range(3):
                        ml.save(model, folder, save_base=version != 3)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    assert saves() == [0, 0, 0]
    ml.save(models[2], folder, save_base=True)
    assert version_of(folder) == 2
    check_theirs(folder)


# what an older save leaves


def test_what_the_new_save_does_not_have_goes(folder):
    ml.save(model_of(2), folder)
    assert not (folder / "base/model.safetensors").exists()
    check_theirs(folder)
    assert read_json(folder / "memory_config.json")["files"].keys() == {"memory.safetensors", "README.md"}


def test_a_file_that_was_changed_since_stays(folder):
    (folder / "base/generation_config.json").write_text("{}")
    ml.save(model_of(2), folder)
    assert [path.name for path in sorted((folder / "base").iterdir())] == [
        "generation_config.json",
        "thesis.pdf",
    ]


def test_a_model_that_was_loaded_with_its_base_keeps_it(folder):
    """Its base is named by the folder that it lies in."""
    model = ml.load(folder)
    with torch.no_grad():
        for _, parameter in ml.memory_parameters(model):
            parameter.mul_(2)
    ml.save(model, folder)
    found = versions(ml.load(folder))
    assert {name: version for name, version in found.items() if version != 1} == {
        name: 2 for name, _ in ml.memory_parameters(model)
    }
    check_theirs(folder)


def test_weights_of_others_in_the_base_are_not_taken_for_it(folder):
    stray = folder / "base/adapter_config.json"
    stray.write_text("{}")
    with pytest.raises(DamagedFile, match=says(str(stray), "move it away")):
        ml.load(folder)
    with pytest.raises(FileExistsError, match=says(str(stray), "move it away")):
        ml.save(model_of(2), folder, save_base=True)
    stray.unlink()
    assert version_of(folder) == 1


def test_the_tokenizer_is_saved_in_the_same_step(folder, tokenizer):
    from transformers import AutoTokenizer

    ml.save(model_of(2), folder, save_base=True, tokenizer=tokenizer)
    for place in (folder, folder / "base"):
        assert (
            AutoTokenizer.from_pretrained(place)("The key")["input_ids"] == tokenizer("The key")["input_ids"]
        )
    ml.save(model_of(3), folder, save_base=True)  # it says nothing of a tokenizer
    assert (folder / "tokenizer.json").is_file() and (folder / "base/tokenizer.json").is_file()
    (folder / "tokenizer_config.json").write_text("{}")  # which load does not read
    assert version_of(folder) == 3
    ml.save(model_of(4), folder)
    assert (folder / "tokenizer.json").is_file() and not (folder / "base/tokenizer.json").exists()


# disks


@pytest.mark.parametrize("save_base", [True, False])
def test_a_full_disk(small_disk, save_base):
    ml.save(model_of(1), small_disk, save_base=True)
    large = model_of(2)
    ml.attach(large, ml.ProductKeyMemoryConfig(layers=[-1], n_keys=64, value_dim=64), name="facts")
    before = contents(small_disk)
    with pytest.raises(OSError, match=says("cannot write", str(small_disk), "No space left")) as told:
        ml.save(large, small_disk, save_base=save_base)
    assert told.value.errno == errno.ENOSPC and DECIDED not in str(told.value)
    assert contents(small_disk) == before
    assert version_of(small_disk) == 1


def test_a_full_disk_for_a_state(small_disk):
    path = small_disk / "alice.safetensors"
    ml.MemoryState({"m": {"x": torch.ones(1, 1000)}}).save(path)
    before = contents(small_disk)
    with pytest.raises(OSError, match=says("cannot write", str(path), "No space left")):
        ml.MemoryState({"m": {"x": torch.ones(1, 1_000_000)}}).save(path)
    assert contents(small_disk) == before
    assert ml.MemoryState.load(path)["m"]["x"].shape == (1, 1000)


def test_a_limit_on_the_size_of_files(folder):
    path, before = folder / "alice.safetensors", contents(folder)
    state = ml.MemoryState({"m": {"x": torch.ones(1, 100_000)}})

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for save in (lambda: ml.save(model_of(2), folder, save_base=True), lambda: state.save(path)):
            with pytest.raises(OSError, match=says("cannot write", str(folder), "File too large")) as told:
                save()
            assert told.value.errno == errno.EFBIG

    assert run_child(limited) == 0
    assert contents(folder) == before
    assert version_of(folder) == 1


def test_a_folder_on_a_disk_that_cannot_be_written(folder):
    bound = subprocess.run(["mount", "--bind", folder, folder], capture_output=True)
    if bound.returncode:
        pytest.skip(f"needs the right to mount: {bound.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        with pytest.raises(OSError, match=says("cannot write", str(folder), "Read-only")):
            ml.save(model_of(2), folder, save_base=True)
        with pytest.raises(OSError, match=says("cannot write", str(folder), "Read-only")):
            ml.MemoryState({"m": {"x": torch.ones(1, 2)}}).save(folder / "alice.safetensors")
        assert version_of(folder) == 1
    finally:
        unmount(folder)
    check_theirs(folder)


def test_an_interrupted_save_on_a_disk_that_cannot_be_written(folder, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["memlayers.files.together"], "_apply", killed)
        with pytest.raises(KeyboardInterrupt):
            ml.save(model_of(2), folder, save_base=True)
    assert (folder / DECIDED).is_dir()
    bound = subprocess.run(["mount", "--bind", folder, folder], capture_output=True)
    if bound.returncode:
        pytest.skip(f"needs the right to mount: {bound.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        with pytest.raises(OSError, match=says(str(folder), "Read-only")):
            ml.load(folder)
    finally:
        unmount(folder)
    assert version_of(folder) == 2
    check_theirs(folder)


# what is in the way


def test_a_link_in_place_of_a_file_is_replaced_and_its_target_stays(folder, tmp_path):
    target = tmp_path / "elsewhere"
    for name in ("memory.safetensors", "memory_config.json", "base/model.safetensors"):
        target.write_bytes(b"theirs")
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        ml.save(model_of(2), folder, save_base=True)
        assert target.read_bytes() == b"theirs" and not (folder / name).is_symlink()
        assert version_of(folder) == 2


def test_a_hard_link_keeps_its_other_name(folder, tmp_path):
    os.link(folder / "memory.safetensors", tmp_path / "copy")
    before = (tmp_path / "copy").read_bytes()
    ml.save(model_of(2), folder, save_base=True)
    assert (tmp_path / "copy").read_bytes() == before
    assert version_of(folder) == 2


def test_a_base_that_is_a_link_is_not_written_through(folder, tmp_path):
    (folder / "base").rename(tmp_path / "shared")
    (folder / "base").symlink_to(tmp_path / "shared")
    before = contents(tmp_path / "shared")
    assert version_of(folder) == 1  # a base that is shared is read
    with pytest.raises(FileExistsError, match=says(str(folder / "base"), "link")):
        ml.save(model_of(2), folder, save_base=True)
    assert contents(tmp_path / "shared") == before
    assert version_of(folder) == 1


def test_something_else_under_the_name_of_a_file(folder, monkeypatch):
    place = folder / "memory.safetensors"
    place.unlink()
    place.mkdir()
    (place / "x").write_bytes(b"mine")
    with pytest.raises(IsADirectoryError, match=says(str(place), "a folder stands there")):
        ml.save(model_of(2), folder, save_base=True)
    assert (place / "x").read_bytes() == b"mine"
    (place / "x").unlink()
    place.rmdir()
    monkeypatch.chdir(folder)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("memory.safetensors")
        with pytest.raises(FileExistsError, match=says(str(place), "no file")):
            ml.save(model_of(2), folder, save_base=True)
        with pytest.raises(FileNotFoundError, match=says(str(place))):
            ml.load(folder)


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_a_users_own_under_the_name_of_our_change(folder, tmp_path, there):
    """It is not ours, so that nothing is done until it is moved away."""
    theirs = folder / DECIDED
    (tmp_path / "target").mkdir()
    (tmp_path / "target/x").write_bytes(b"mine")
    if there == "folder":
        theirs.mkdir()
        (theirs / "x").write_bytes(b"mine")
    elif there == "file":
        theirs.write_bytes(b"mine")
    else:
        theirs.symlink_to(tmp_path / "target")
    before = contents(folder)
    for call in (lambda: ml.save(model_of(2), folder, save_base=True), lambda: ml.load(folder)):
        with pytest.raises(DamagedFile, match=says(str(theirs), "move it away")):
            call()
    assert contents(folder) == before and (tmp_path / "target/x").read_bytes() == b"mine"


# modes


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        ml.save(model_of(1), tmp_path / "out", save_base=True)
        ml.write(model_of(1), tokens(1, 4)).save(tmp_path / "out/alice.safetensors")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)} and len(files) == 7


def test_a_file_that_exists_keeps_its_mode(folder):
    state = ml.write(model_of(1), tokens(1, 4))
    state.save(folder / "alice.safetensors")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o600)
    ml.save(model_of(2), folder, save_base=True)
    state.save(folder / "alice.safetensors")
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
