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

import memlayers as ml
from memlayers.lora import making
from memlayers.lora import store as store_module
from tests.lora.bank_cases import files, some

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
def banks(everywhere, monkeypatch):
    """Makes copies of one bank, and trains each shard once only: what is tested here is files."""
    train, known = making.train_shard, {}

    def once(model, memory, tokenizer, documents, name, config, **options):
        key = (name, tuple(sorted(documents.items())))
        if key not in known:
            known[key] = train(model, memory, tokenizer, documents, name, config, **options)
        return known[key]

    monkeypatch.setattr(making, "train_shard", once)
    bank = everywhere.new("start", encoder=encoder)
    bank.add(some("handbook", "secret"), "red", "a")
    bank.add(some("menu"), "red", "b")

    def copy(name):
        shutil.rmtree(everywhere.folder / name, ignore_errors=True)
        shutil.copytree(everywhere.folder / "start", everywhere.folder / name)
        return everywhere.open(name, encoder=encoder)

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
        opened = ml.LoRABank.open(bank.path, bank.model, bank.tokenizer, memory="notes", encoder=encoder)
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
def test_a_full_disk_at_any_time(banks, change, monkeypatch):
    start, changed = banks("other"), banks("changed")
    change(changed)
    old, new, fsync = files(start.path), files(changed.path), os.fsync
    for at in range(1000):
        bank, left = banks("bank"), iter(range(at))

        def full(descriptor, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                change(bank)
                break
            except OSError as error:
                note = "".join(error.__notes__)
        assert files(bank.path) == (old if "is as it was" in note else new), (
            f"fsync {at}: something is left over"
        )
        assert bank.list() == (changed if files(bank.path) == new else start).list()
    assert at > 8 and files(bank.path) == new


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

    monkeypatch.setattr(store_module, "open", lambda *a: Full(open(*a)), raising=False)  # noqa: SIM115
    for change in CHANGES.values():
        with pytest.raises(OSError, match="No space left") as error:
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
        patch.setattr(shutil, "rmtree", refused)
        with pytest.raises(PermissionError) as error:
            bank.forget("secret")
    assert "has changed; open it again" in "".join(error.value.__notes__)
    assert list(bank.list()[0].documents) == ["handbook"]
    banked = ml.LoRABank.open(bank.path, bank.model, bank.tokenizer, memory="notes", encoder=encoder)
    assert b"Zanzibar" not in b"".join(data or b"" for data in files(banked.path).values())


def test_a_bank_that_is_being_changed_is_not_cleaned(banks):
    bank = banks("bank")
    with bank._store.locked():
        (bank.path / "shards" / ".c-0123456789abcdef.tmp").mkdir()
        ml.LoRABank.open(bank.path, bank.model, bank.tokenizer, memory="notes", encoder=encoder)
        assert (bank.path / "shards" / ".c-0123456789abcdef.tmp").is_dir()
    ml.LoRABank.open(bank.path, bank.model, bank.tokenizer, memory="notes", encoder=encoder)
    assert not (bank.path / "shards" / ".c-0123456789abcdef.tmp").exists()


def test_a_process_that_dies_while_it_holds_the_bank(banks):
    bank = banks("bank")
    child = os.fork()
    if child == 0:
        with bank._store.locked():
            os._exit(DIED)
    os.waitpid(child, 0)
    bank.add(some("visit"), "red", "c")
    assert (bank.path / ".lock").read_bytes() == b""
