"""Damaged files of a bank: an error that names the file, or the right answer; no document is lost, and all can be forgotten.

`MEMLAYERS_FUZZ=4000` sets the number of trials.
"""

import contextlib
import os
import random
import shutil
import struct
import warnings

import pytest
import torch
from matrix import says

from memlayers.files import DamagedFile
from tests.lora.bank_cases import (
    CONFIG,
    QUESTIONS,
    TEXTS,
    files,
    flipped,
    found_in,
    shard_files,
    some,
    traces,
)

FUZZ = int(os.environ.get("MEMLAYERS_FUZZ", "150"))
SHARD_FILES = (
    "manifest.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "documents.jsonl",
    "router.safetensors",
)
RIGHTS = [["red"], ["red", "blue"]]


def encoder(texts):
    return torch.tensor([[float(len(text)), 1.0, float(text.count("e"))] for text in texts])


@pytest.fixture
def banks(makes):
    """Copies of a bank of two groups and three shards, which are not trained."""
    start = makes.new("start", CONFIG.model_copy(update={"steps": 0}), encoder=encoder)
    start.add(some("handbook", "menu"), "red", "rules")
    start.add(some("secret"), "red", "vault")
    start.add(some("visit"), "blue", "calls")

    def copy():
        shutil.rmtree(makes.folder / "bank", ignore_errors=True)
        shutil.copytree(start.path, makes.folder / "bank")
        return copy.open()

    copy.open = lambda **options: makes.open("bank", encoder=encoder, **options)
    copy.start = start
    return copy


def answers(bank, folder):
    """What each way to use a bank gives: the answer, or the error."""
    shutil.rmtree(folder, ignore_errors=True)
    ways = {
        "list": lambda: bank.list(),
        "list red": lambda: bank.list(["red"]),
        "list blue": lambda: bank.list(["blue"]),
        "route": lambda: bank.route(QUESTIONS, groups=RIGHTS, top_k=3),
        "route blue": lambda: bank.route(QUESTIONS, groups=[["blue"], []], top_k=3),
        "read": lambda: [x.tolist() for x in bank.read(QUESTIONS, groups=RIGHTS, top_k=3)["notes"].values()],
        "export": lambda: files(bank.export("rules", folder / "rules")),
        "export blue": lambda: files(bank.export("calls", folder / "calls")),
    }
    found = {}
    for name, ask in ways.items():
        try:
            found[name] = ask()
        except (DamagedFile, FileNotFoundError) as error:
            found[name] = error
    return found


def check(found, right, path):
    """Every answer is the right one or an error that names the file; how many are errors."""
    for way, answer in found.items():
        if isinstance(answer, Exception):
            assert str(path) in str(answer), way
        else:
            assert answer == right[way], way
    return sum(isinstance(answer, Exception) for answer in found.values())


def test_one_bit_of_bank_json(banks):
    rng, bank = random.Random(0), banks()
    whole, shards = (bank.path / "bank.json").read_bytes(), files(bank.path / "shards")
    right, refused = bank.list(), 0
    for trial in range(FUZZ):
        (bank.path / "bank.json").write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        try:
            assert banks.open().list() == right
        except DamagedFile as error:
            assert str(bank.path / "bank.json") in str(error) and "repair=True" in str(error)
            refused += 1
            for change in (lambda: bank.forget("menu"), lambda: bank.add({"new": "Some more text."}, "red")):
                with pytest.raises(DamagedFile):
                    change()
            if trial % 10 == 0:
                with pytest.warns(UserWarning, match="was made again"):
                    assert banks.open(repair=True).list() == right
        assert files(bank.path / "shards") == shards, "documents lost"
    print(f"{refused} of {FUZZ} flips of bank.json refused, the others read right; 0 documents lost")
    assert refused > FUZZ / 2


def test_one_bit_of_a_manifest(banks, makes):
    rng, bank = random.Random(1), banks()
    paths = [shard_files(bank, name)["manifest.json"] for name in ("rules", "vault", "calls")]
    wholes = [path.read_bytes() for path in paths]
    right, folder = answers(bank, makes.folder / "out"), makes.folder / "out"
    for trial in range(FUZZ):
        path, whole = paths[trial % 3], wholes[trial % 3]
        path.write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        opened = banks.open()
        with pytest.raises(DamagedFile, match=says(str(path))):
            opened.list()
        assert opened.route(QUESTIONS, groups=RIGHTS, top_k=3) == right["route"]
        if trial % 20 == 0:
            check(answers(opened, folder), right, path)
            assert list(opened.repair().mended) == [path.parent.name[:-17]] and path.read_bytes() == whole
        path.write_bytes(whole)
    assert files(bank.path) == files(banks.start.path)
    print(f"{FUZZ} flips of manifests noticed; 0 documents lost")


def test_any_file_of_a_shard(banks, makes):
    rng, right = random.Random(2), answers(banks(), makes.folder / "out")
    errors = mended = forgotten = 0
    for _ in range(FUZZ // 8):
        bank = banks()
        shard, name = rng.choice(["rules", "vault", "calls"]), rng.choice(SHARD_FILES)
        path = shard_files(bank, shard)[name]
        whole = path.read_bytes()
        damage(path, shard_files(bank, "rules" if shard == "calls" else "calls")[name], rng)
        if path.exists() and path.read_bytes() == whole:
            continue
        errors += check(answers(banks.open(), makes.folder / "out"), right, path)
        report = bank.repair()
        assert shard in {**report.mended, **report.damaged}
        assert (shard in report.lost) == (name == "documents.jsonl") or shard not in report.damaged
        mended += shard in report.mended
        if shard in report.mended:
            assert answers(banks.open(), makes.folder / "out") == right and files(bank.path) == files(
                banks.start.path
            )
        gone = rng.choice(["menu", "secret", "visit"])
        others = {"rules": {"handbook", "menu"}, "vault": {"secret"}, "calls": {"visit"}}[shard] - {gone}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                bank.forget(gone)
            except FileExistsError as error:  # the texts of another shard were copied over this one's
                assert str(path.parent) in str(error) and name in ("documents.jsonl", "manifest.json")
                others = set(bank._store.read().shards[shard].documents)
                bank.forget([gone, *others])
        assert found_in(bank.path, traces(TEXTS[gone], gone)) == []
        left = {
            document
            for manifest in banks.open()._store.read().shards.values()
            for document in manifest.documents
        }
        assert left >= set(TEXTS) - {gone} - others and gone not in left
        forgotten += 1
    print(
        f"{errors} answers were errors that name the file, all others right; {mended} shards mended, {forgotten} forgotten"
    )
    assert errors and mended and forgotten


def damage(path, other, rng):
    """Change a file as an accident does."""
    data, kind = bytearray(path.read_bytes()), rng.randrange(8)
    at = rng.randrange(len(data))
    if kind == 0:
        data = bytearray(flipped(data, rng.randrange(8 * len(data))))
    elif kind == 1:
        data = data[:at]
    elif kind == 2:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == 3:
        data = bytearray(other.read_bytes())
    elif kind == 4:
        data[-4:] = struct.pack("<f", float("nan"))
    elif kind == 5:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**62, 2**64 - 1]))
    elif kind == 6:
        data += bytes(rng.randrange(1, 100))
    path.unlink() if kind == 7 else path.write_bytes(data)


# deletion from a damaged bank


@pytest.mark.parametrize("name", [*SHARD_FILES, None])
@pytest.mark.parametrize("shard", ["calls", "rules"], ids=["the shard of another", "its own shard"])
def test_forget_in_a_damaged_bank(banks, shard, name):
    bank = banks()
    for path in shard_files(bank, shard).values():
        if name in (path.name, None):
            path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="'menu' is in the bank already"):
        bank.add(some("menu"), "blue")
    lost = shard == "rules" and name in ("documents.jsonl", None)
    with (
        pytest.warns(UserWarning, match=r"\['handbook'\] were damaged") if lost else contextlib.nullcontext()
    ):
        left = bank.forget("menu")
    assert found_in(bank.path, traces(TEXTS["menu"], "menu")) == []
    assert [list(manifest.documents) for manifest in left] == ([] if lost else [["handbook"]])
    if not lost:
        assert banks.open().list(["red"])[0].documents.keys() == {"handbook"}
        assert "Where" in QUESTIONS[0] and banks.open().read(QUESTIONS, groups=[["red"]] * 2)
    bank.add(some("menu"), "red", "again")


@pytest.mark.parametrize("name", SHARD_FILES)
def test_forget_all_of_a_damaged_shard(banks, name):
    bank = banks()
    path = shard_files(bank, "rules")[name]
    path.write_bytes(b"")
    assert bank.forget(["menu", "handbook"]) == []
    assert not path.parent.exists() and [m.name for m in bank.list()] == ["calls", "vault"]


def test_forget_where_the_folder_is_gone(banks):
    bank = banks()
    shutil.rmtree(shard_files(bank, "rules")["manifest.json"].parent)
    with pytest.warns(UserWarning, match=r"\['handbook'\] were damaged"):
        assert bank.forget("menu") == []
    assert found_in(bank.path, traces(TEXTS["menu"], "menu")) == []
    shutil.rmtree(bank.path / "shards")
    bank.forget(["secret", "visit"])
    assert bank.list() == []


def test_texts_beside_a_damaged_one_are_kept(banks):
    bank = banks()
    bank.add(
        {"x": "The first of the texts.", "y": "The second of the texts.", "z": "The third."}, "red", "more"
    )
    path = shard_files(bank, "more")["documents.jsonl"]
    path.write_bytes(path.read_bytes().replace(b"second", b"zecond"))
    with pytest.warns(UserWarning, match=r"documents \['y'\] were damaged.*add them again"):
        (manifest,) = bank.forget("z")
    assert list(manifest.documents) == ["x"] and found_in(bank.path, [b"The third.", b"zecond"]) == []
    bank.add({"y": "The second of the texts."}, "red")


def test_other_shards_are_changed_beside_a_damaged_one(banks):
    bank = banks()
    for path in shard_files(bank, "calls").values():
        path.unlink()
    bank.add({"new": "Some words of a new text."}, "blue", "new")
    bank.update({"menu": "Nothing to eat."})
    bank.merge(["rules", "vault"], "all")
    assert [m.name for m in bank.list(["red"])] == ["all"]
    with pytest.raises(FileNotFoundError, match=says("calls-", "manifest.json is missing", "bank.repair()")):
        bank.list()


@pytest.mark.parametrize("place", ["calls", "unknown"])
def test_a_copy_of_the_text_in_another_folder(banks, place):
    """It would outlive the deletion, and is not ours to delete."""
    bank = banks()
    source = shard_files(bank, "rules")["documents.jsonl"]
    if place == "calls":
        path = shard_files(bank, "calls")["documents.jsonl"]
        shutil.copy(source, path)
    else:  # as of an older bank.json that was put back
        path = bank.path / "shards" / "rules-0123456789abcdef" / "documents.jsonl"
        shutil.copytree(source.parent, path.parent)
    before = files(bank.path)
    with pytest.raises(
        FileExistsError, match=says(str(path.parent), "holds document 'menu' too", "Nothing was changed")
    ):
        bank.forget("menu")
    assert files(bank.path) == before
    path.unlink() if place == "calls" else shutil.rmtree(path.parent)
    bank.forget("menu")
    assert found_in(bank.path, traces(TEXTS["menu"], "menu")) == []
