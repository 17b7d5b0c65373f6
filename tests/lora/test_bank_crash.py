"""A change of a bank that is cut off, anywhere, leaves the bank before it or after it."""

import contextlib
import errno
import os
import shutil
import stat
import sys
import traceback

import pytest
import torch

from memlayers.lora import folders as folders_module
from memlayers.lora import making
from memlayers.lora import store as store_module
from tests.lora.bank_cases import files, learned, rewrite, some

DIED, DONE = 71, 72
FILE_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}

CHANGES = {
    "add": lambda bank: bank.add(some("visit"), "blue", "calls"),
    "update": lambda bank: bank.update({"handbook": "The key is lost.", "menu": "There is no food."}),
    "forget": lambda bank: bank.forget(["secret", "menu"]),
    "merge": lambda bank: bank.merge(["a", "b"], "c"),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def encoder(texts):
    return torch.tensor([[float(len(text)), 1.0] for text in texts])


@pytest.fixture
def banks(makes, monkeypatch):
    """Makes copies of one bank, of shards that are not trained: what is tested here is files."""
    monkeypatch.setattr(making, "train_shard", learned)
    bank = makes.new("start", encoder=encoder)
    bank.add(some("handbook", "secret"), "red", "a")
    bank.add(some("menu"), "red", "b")

    def copy(name):
        shutil.rmtree(makes.folder / name, ignore_errors=True)
        shutil.copytree(makes.folder / "start", makes.folder / name)
        return makes.open(name, encoder=encoder)

    copy.open = lambda path: makes.open(path.name, encoder=encoder)
    return copy


def dies_in(change, bank, at: int) -> bool:
    """Run `change` in a process that dies right before its file operation number `at`, with what it last wrote cut in
    half on the disk where that is an fsync; whether it came so far."""
    child = os.fork()
    if child == 0:
        _die(change, bank, at)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (DIED, DONE)
    return os.waitstatus_to_exitcode(status) == DIED


def _die(change, bank, at: int) -> None:
    count, fsync = 0, os.fsync

    def operation(descriptor=None):
        nonlocal count
        if count == at:
            if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                count += 1  # the truncation is none of the change's own operations
                with contextlib.suppress(OSError):  # the path: a descriptor may be for reading only
                    os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)
            os._exit(DIED)
        count += 1

    def hook(event, arguments):
        if event in FILE_EVENTS or (event == "open" and str(arguments[0]).startswith(str(bank.path))):
            operation()

    def counted(descriptor):
        operation(descriptor)
        fsync(descriptor)

    try:
        os.fsync = counted
        sys.addaudithook(hook)
        change(bank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(DONE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test kills forked processes")
@changes
def test_a_process_that_dies_at_any_file_operation(banks, change):
    start, changed = banks("other"), banks("changed")
    change(changed)
    old, new, seen = files(start.path), files(changed.path), []
    for at in range(1000):
        bank = banks("bank")
        died = dies_in(change, bank, at)
        left = files(bank.path)
        opened = banks.open(bank.path)
        after = files(bank.path)
        assert after in (old, new), f"operation {at}: neither the old bank nor the new one"
        assert opened.list() == (changed if after == new else start).list()
        seen.append((after == new, left != after))
        if not died:
            break
    results = [is_new for is_new, _ in seen]
    assert results == sorted(results) and {False, True} == set(results), "old up to one operation, then new"
    assert any(debris for _, debris in seen) and at > 20


@changes
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_full_disk_at_any_time(banks, change, lasting, monkeypatch):
    start, changed = banks("other"), banks("changed")
    change(changed)
    old, new, fsync = files(start.path), files(changed.path), os.fsync
    for at in range(1000):
        bank, count = banks("bank"), 0

        def full(descriptor, at=at):
            nonlocal count
            count += 1
            if count == at + 1 or (lasting and count > at):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                change(bank)
                break
            except OSError as error:
                note = "".join(error.__notes__)
        if lasting:  # what is left over is named in bank.json
            banks.open(bank.path)
        assert files(bank.path) == (old if "is as it was" in note else new), (
            f"fsync {at}: something is left over"
        )
        assert bank.list() == (changed if files(bank.path) == new else start).list()
    assert at > 8 and files(bank.path) == new


@changes
@pytest.mark.parametrize("twice", [False, True], ids=["once", "and again"])
def test_ctrl_c_at_any_file_operation(banks, change, twice, monkeypatch):
    start, changed = banks("other"), banks("changed")
    change(changed)
    old, new, seen = files(start.path), files(changed.path), []
    names = ["open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod", "listdir", "lstat"]
    for at in range(0, 1000, 3 if twice else 1):
        bank, count = banks("bank"), 0

        def interrupted(operation, at=at):
            def operate(*arguments, **options):
                nonlocal count
                count += 1
                if count == at + 1 or (twice and count == at + 4):
                    raise KeyboardInterrupt
                return operation(*arguments, **options)

            return operate

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, interrupted(getattr(os, name)))
            try:
                change(bank)
                break
            except KeyboardInterrupt:
                pass
        if twice:
            bank = banks.open(bank.path)
        assert files(bank.path) in (old, new), f"operation {at}: neither the old bank nor the new one"
        seen.append(files(bank.path) == new)
    assert seen == sorted(seen) and {False, True} == set(seen) and at > 50


def test_a_disk_that_takes_half_a_file(banks, monkeypatch):
    bank = banks("bank")
    old = files(bank.path)

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders_module, "open", lambda *a: Full(open(*a)), raising=False)  # noqa: SIM115
    for change in CHANGES.values():
        with pytest.raises(OSError, match=r"cannot write .*adapter.*No space left") as error:
            change(bank)
        assert "as it was" in "".join(error.value.__notes__) and files(bank.path) == old
    monkeypatch.undo()
    bank.forget("secret")
    assert b"Zanzibar" not in b"".join(data or b"" for data in files(bank.path).values())


def test_old_files_that_cannot_be_deleted(banks, monkeypatch):
    bank = banks("bank")

    def refused(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "remove_folder", refused)
        with pytest.raises(PermissionError) as error:
            bank.forget("secret")
        assert "has changed; open it again" in "".join(error.value.__notes__)
        with pytest.warns(UserWarning, match="old files that are to be deleted and cannot be"):
            opened = banks.open(bank.path)
        assert [*opened.repair().leftovers.values()] == [
            f"[Errno 1] Operation not permitted: '{bank.path}/shards/{name}'" for name in _leftovers(bank)
        ]
        opened.add(some("visit"), "red", "c")
    assert list(bank.list()[0].documents) == ["handbook"]
    assert len(_leftovers(bank)) == 1
    banks.open(bank.path)
    assert _leftovers(bank) == []
    assert b"Zanzibar" not in b"".join(data or b"" for data in files(bank.path).values())


def _leftovers(bank):
    return bank._store.read().leftovers


def test_a_bank_that_is_being_changed_is_not_cleaned(banks):
    bank = banks("bank")
    name = "c-0123456789abcdef"
    with bank._store.locked():
        (bank.path / "shards" / name).mkdir()
        rewrite(bank, leftovers=[name])
        banks.open(bank.path)
        assert (bank.path / "shards" / name).is_dir()
    banks.open(bank.path)
    assert not (bank.path / "shards" / name).exists() and _leftovers(bank) == []


def test_a_process_that_dies_while_it_holds_the_bank(banks):
    bank = banks("bank")
    child = os.fork()
    if child == 0:
        with bank._store.locked():
            os._exit(DIED)
    os.waitpid(child, 0)
    bank.add(some("visit"), "red", "c")
    assert (bank.path / ".lock").read_bytes() == b""
