"""Kills, full disks, limits, disks that may only be read, and the rights of a bank's files.

`MEMLAYERS_KILLS=200` sets the number of kills.
"""

import errno
import os
import shutil
import stat
import subprocess

import pytest
import torch

from memlayers.lora import making
from tests.disks import mounted_disk
from tests.killing import kill_at_random_moments, run_child
from tests.lora.bank_cases import QUESTIONS, TEXTS, files, found_in, learned, shard_files, some, traces


def encoder(texts):
    return torch.tensor([[float(len(text)), 1.0 / len(text), 1.0] for text in texts])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(making, "train_shard", learned)


def filled(makes, name="start"):
    bank = makes.new(name, encoder=encoder)
    bank.add(some("handbook", "secret"), "red", "a")
    bank.add(some("menu"), "red", "b")
    return bank


TOLD = 71
CHANGES = {
    "add": lambda bank: bank.add(some("visit"), "blue", "calls"),
    "forget": lambda bank: bank.forget("secret"),
    "forget a shard": lambda bank: bank.forget("menu"),
    "update": lambda bank: bank.update({"handbook": "The key is lost.", "menu": "There is no food."}),
}
changes = pytest.mark.parametrize("name", CHANGES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test kills forked processes")
@changes
def test_killed_at_random_moments(makes, name):
    start, changed = filled(makes), filled(makes, "changed")
    gone = {"forget": "secret", "forget a shard": "menu"}.get(name)
    path, old = makes.folder / "bank", files(start.path)
    wanted = []
    if gone:
        shard = shard_files(start, "a" if gone == "secret" else "b")
        adapter, router = (shard[f"{file}.safetensors"].read_bytes() for file in ("adapter_model", "router"))
        wanted = traces(TEXTS[gone], gone, adapter[-64:], router[-12:], shard["manifest.json"].parent.name)
        assert len(found_in(start.path, wanted)) == len(wanted)
    CHANGES[name](changed)
    new, debris = files(changed.path), 0

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(start.path, path)

    def check():
        nonlocal debris
        left = files(path)
        bank = makes.open("bank", encoder=encoder)
        now = files(path)
        debris += now != left
        assert now in (old, new), "neither the old bank nor the new one"
        assert bank.repair(dry_run=True).damaged == {}
        if now == new:
            assert found_in(path, wanted) == []
        return "old" if now == old else "new"

    found = kill_at_random_moments(prepare, lambda: CHANGES[name](makes.open("bank", encoder=encoder)), check)
    print(f"{name}: {found}, {debris} times something was left over for the next open")


# disks


@pytest.fixture
def small_disk(makes):
    """A disk of 600 KB."""
    with mounted_disk(makes.folder / "disk") as folder:
        yield folder


def fill(folder, free: int) -> None:
    """Fill a disk but for some bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - free))


@changes
def test_a_disk_that_is_full(makes, small_disk, name):
    start = filled(makes)
    old, needs = files(start.path), 0
    for free in range(0, 200_000, 8192):
        path = small_disk / "bank"
        shutil.copytree(start.path, path)
        bank = makes.open("disk/bank", encoder=encoder)
        fill(small_disk, free)
        try:
            CHANGES[name](bank)
        except OSError as error:
            assert error.errno == errno.ENOSPC and str(path) in str(error)
            assert "as it was" in "".join(error.__notes__)
            assert files(path) == old, f"{free} bytes free: something is left over"
            assert bank.read(QUESTIONS, groups=[["red"]] * 2)
            (small_disk / "filler").unlink()
            CHANGES[name](bank)
            needs += 1
        assert bank.repair(dry_run=True).damaged == {} and files(path) != old
        for each in small_disk.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    assert (needs == 0) == (name == "forget a shard"), "what is only deleted needs no room"


def test_a_bank_is_made_on_a_full_disk(makes, small_disk):
    fill(small_disk, 0)
    with pytest.raises(OSError, match="No space left"):
        makes.new("disk/bank")
    assert not (small_disk / "bank").exists()


@changes
def test_files_that_may_not_grow(makes, name):
    resource = pytest.importorskip("resource")
    start = filled(makes)
    old, path = files(start.path), makes.folder / "bank"
    for limit in (0, 100, 1000, 5000, 20_000):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(start.path, path)
        bank = makes.open("bank", encoder=encoder)

        def limited(limit=limit, bank=bank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                CHANGES[name](bank)
            except OSError as error:
                assert error.errno == errno.EFBIG and str(path) in str(error)
                assert "as it was" in "".join(error.__notes__)
                os._exit(TOLD)

        status = run_child(limited)
        assert status in (0, TOLD) and (files(path) == old) == (status == TOLD)
        assert limit > 1000 or status == TOLD


def test_a_disk_that_may_only_be_read(makes, small_disk, monkeypatch):
    path = small_disk / "bank"
    shutil.copytree(filled(makes).path, path)
    bank = makes.open("disk/bank", encoder=encoder)
    with monkeypatch.context() as patch:
        patch.setattr("memlayers.lora.store.remove_folder", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            bank.forget("menu")
    before = files(path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.warns(UserWarning, match="old files that are to be deleted and cannot be"):
            opened = makes.open("disk/bank", encoder=encoder)
        assert opened.read(QUESTIONS, groups=[["red"]] * 2) and [m.name for m in opened.list()] == ["a"]
        for change in (CHANGES["add"], CHANGES["forget"]):
            with pytest.raises(OSError, match="Read-only file system"):
                change(opened)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert files(path) == before
    makes.open("disk/bank", encoder=encoder)
    assert found_in(path, traces(TEXTS["menu"], "menu")) == []


def _interrupted(folder):
    raise KeyboardInterrupt


# rights of files


def modes(bank) -> tuple[set[int], set[int]]:
    """Of all files of a bank, and of all its folders."""
    found = [bank.path, *bank.path.rglob("*")]
    return tuple(
        {
            stat.S_IMODE(path.stat().st_mode)
            for path in found
            if path.is_dir() == folders and path.name != ".lock"
        }
        for folders in (False, True)
    )


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_files_follow_the_umask(makes, umask, mask):
    umask(mask)
    bank = filled(makes)
    CHANGES["update"](bank)
    assert modes(bank) == ({0o666 & ~mask}, {0o777 & ~mask})


def test_files_of_a_bank_that_is_private_stay_so(makes, umask):
    bank = filled(makes)
    os.chmod(bank.path / "bank.json", 0o600)
    CHANGES["forget"](bank)
    CHANGES["update"](bank)
    CHANGES["add"](bank)
    assert modes(bank)[0] == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (bank.path / "shards").iterdir()} == {0o700}
    path = shard_files(bank, "calls")["router.safetensors"]
    path.write_bytes(b"")
    assert list(bank.repair().mended) == ["calls"] and modes(bank)[0] == {0o600}
