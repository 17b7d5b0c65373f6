"""`bank.repair()`, and a `bank.json` that is made again, of an earlier version, or older than the shards."""

import json
import shutil

import pytest
import torch
from matrix import says

import memlayers as ml
from memlayers.files import DamagedFile
from memlayers.lora import BankReport
from tests.lora.bank_cases import CONFIG, QUESTIONS, TEXTS, files, rewrite, shard_files, some

ALL = ["calls", "rules"]


def encoder(texts):
    return torch.tensor([[float(len(text)), 1.0] for text in texts])


def folder_of(bank, name):
    return shard_files(bank, name)["manifest.json"].parent


# repair


def test_a_whole_bank(bank):
    before = files(bank.path)
    assert bank.repair(dry_run=True) == bank.repair() == BankReport(whole=ALL)
    assert files(bank.path) == before


def test_what_can_be_made_again_is(makes):
    bank = makes.new()
    bank.add(some("handbook", "menu"), "red", "rules")
    bank.update({"menu": "On Monday we fast."})
    before = files(bank.path)
    damaged = [path for name, path in shard_files(bank, "rules").items() if name != "documents.jsonl"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-2])
    broken = files(bank.path)
    report = bank.repair(dry_run=True)
    assert report.whole == [] and report.lost == {} and files(bank.path) == broken
    assert len(report.damaged["rules"]) == 4
    for path in damaged:
        assert any(str(path) in line for line in report.damaged["rules"])
    mended = bank.repair()
    assert mended == BankReport(whole=["rules"], mended=report.damaged)
    assert files(bank.path) == before, "the same bits: trained again from the same texts"


def test_documents_that_are_lost_are_told_and_stay(makes, bank):
    path = shard_files(bank, "rules")["documents.jsonl"]
    path.write_text(path.read_text().replace("soup", "soap"))
    before = files(bank.path)
    report = bank.repair()
    assert report == BankReport(
        whole=["calls"], damaged={"rules": report.damaged["rules"]}, lost={"rules": ["menu"]}
    )
    assert files(bank.path) == before, "what is left of a text may be of use to its owner"
    bank.update({"menu": TEXTS["menu"]})
    assert bank.repair() == BankReport(whole=ALL)


def test_a_line_too_much_in_the_documents_is_no_loss(bank):
    path = shard_files(bank, "rules")["documents.jsonl"]
    whole = path.read_bytes()
    path.write_bytes(b'{"id": "ghost", "text": "boo"}\n' + whole + b"\n\xff\n[1]\n5\n" + b"[" * 100_000)
    assert list(bank.repair().mended) == ["rules"] and path.read_bytes() == whole


def test_a_shard_that_is_not_trained_to_the_same_bits(makes, bank, monkeypatch):
    """As on another machine: it gets a new folder, with the history of the old one."""
    from memlayers.lora import making

    old, train = folder_of(bank, "rules"), making.train_shard
    manifest = bank.list()[1]
    shard_files(bank, "rules")["adapter_model.safetensors"].unlink()
    monkeypatch.setattr(
        making, "train_shard", lambda *a, **o: {f: x + 1e-3 for f, x in train(*a, **o).items()}
    )
    assert bank.repair().whole == ALL
    assert not old.exists() and folder_of(bank, "rules") != old
    assert bank.list()[1].model_copy(update={"adapter": manifest.adapter}) == manifest


def test_links_are_not_mended(makes, bank):
    path = shard_files(bank, "rules")["router.safetensors"]
    shutil.move(path, makes.folder / "elsewhere")
    path.symlink_to(makes.folder / "elsewhere")
    report = bank.repair()
    assert list(report.damaged) == ["rules"] and "is a link" in report.damaged["rules"][0]
    assert path.is_symlink()


# bank.json


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: None])
def test_bank_json_is_made_again(makes, bank, damage):
    before, path = files(bank.path), bank.path / "bank.json"
    left = damage(path.read_bytes())
    path.unlink() if left is None else path.write_bytes(left)
    with pytest.raises((DamagedFile, FileNotFoundError), match=says("bank.json")):
        makes.open()
    with pytest.warns(UserWarning, match=says("was made again", "'calls', 'rules'", "forgotten")):
        opened = makes.open(repair=True)
    assert files(bank.path) == before and opened.repair() == BankReport(whole=ALL)
    assert makes.open(repair=True).list() == opened.list(), "a bank that is whole is only opened"


def test_shards_that_are_not_whole_are_left_out_and_stay(makes, bank):
    path = shard_files(bank, "calls")["router.safetensors"]
    path.write_bytes(b"")
    (bank.path / "shards" / "thesis").mkdir()
    (bank.path / "bank.json").write_text("{")
    before = files(bank.path / "shards")
    with pytest.warns(UserWarning, match=says("are not whole", path.parent.name, "thesis")):
        opened = makes.open(repair=True)
    assert [m.name for m in opened.list()] == ["rules"] and files(bank.path / "shards") == before
    assert opened.repair().unknown == [f"shards/{path.parent.name}", "shards/thesis"]


def test_nothing_to_make_it_from(makes, bank):
    for name in ALL:
        shard_files(bank, name)["router.safetensors"].write_bytes(b"")
    (bank.path / "bank.json").write_text("{")
    before = files(bank.path / "shards")
    with pytest.raises(DamagedFile, match="no shard of this base is whole"):
        makes.open(repair=True)
    with pytest.raises(FileNotFoundError, match="no bank at"):
        makes.open("nothing", repair=True)
    assert files(bank.path / "shards") == before and not (makes.folder / "nothing").exists()


def test_an_interrupted_forget_beside_a_damaged_bank_json(makes, bank, monkeypatch):
    """What was to go is not taken up: `bank.json` still says it, though its checksum is wrong."""
    with monkeypatch.context() as patch:
        patch.setattr("memlayers.lora.store.remove_folder", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            bank.forget("menu")
    path = bank.path / "bank.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    with pytest.warns(UserWarning, match="was made again"):
        opened = makes.open(repair=True)
    assert [list(m.documents) for m in opened.list()] == [["visit"], ["handbook"]]
    assert b"soup" not in b"".join(data or b"" for data in files(bank.path).values())


def test_two_folders_of_one_document_are_not_chosen_between(makes, bank, monkeypatch):
    """An interrupted update, of which `bank.json` tells nothing any more."""
    with monkeypatch.context() as patch:
        patch.setattr("memlayers.lora.store.remove_folder", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            bank.update({"menu": "On Monday we fast."})
    (bank.path / "bank.json").write_text("{")
    before = files(bank.path)
    with pytest.raises(DamagedFile, match=says("both hold the name 'rules'", "move the older one away")):
        makes.open(repair=True)
    assert files(bank.path) == {**before, ".lock": b""}


def _interrupted(folder):
    raise KeyboardInterrupt


def test_the_encoder_of_a_bank_whose_bank_json_is_made_again(makes):
    bank = makes.new(encoder=encoder)
    bank.add(some("menu"), "red", "rules")
    (bank.path / "bank.json").write_text("{")
    for options in ({}, {"encoder": lambda texts: torch.ones(len(texts), 2)}):
        with pytest.raises(ValueError, match="made by another encoder than the one given"):
            makes.open(repair=True, **options)
    with pytest.warns(UserWarning, match="was made again"):
        assert makes.open(repair=True, encoder=encoder).repair() == BankReport(whole=["rules"])


def as_v1(bank, **fields):
    """Write `bank.json` as the version before did."""
    index = json.loads((bank.path / "bank.json").read_text())
    shards = {name: {"folder": e["folder"], "group": e["group"]} for name, e in index["shards"].items()}
    kept = {k: index[k] for k in ("base", "r", "lora_alpha", "targets", "router", "config")}
    (bank.path / "bank.json").write_text(
        json.dumps({"format": "memlayers.bank.v1", **kept, "shards": shards, **fields})
    )


def test_a_bank_of_the_version_before(makes, bank):
    before = files(bank.path)
    as_v1(bank)
    (bank.path / "shards" / "calls-0123456789abcdef").mkdir()
    with pytest.raises(ml.ConfigError, match=says("bank.json", "earlier version", "repair=True")):
        makes.open()
    with pytest.warns(UserWarning, match="was made again"):
        opened = makes.open(repair=True)
    (bank.path / "shards" / "calls-0123456789abcdef").rmdir()
    assert files(bank.path) == before and opened.repair() == BankReport(whole=ALL)
    empty = makes.new("empty", CONFIG)
    whole = files(empty.path)
    as_v1(empty)
    with pytest.warns(UserWarning, match="was made again"):
        makes.open("empty", repair=True)
    assert files(empty.path) == whole


# an index that is older than the shards, or names none


def test_an_older_bank_json_is_put_back(makes, bank):
    older = (bank.path / "bank.json").read_bytes()
    bank.add(some("secret"), "red", "vault")
    vault = files(folder_of(bank, "vault"))
    bank.forget("menu")
    (bank.path / "bank.json").write_bytes(older)
    before = files(bank.path / "shards")
    opened = makes.open()
    with pytest.raises(FileNotFoundError, match=says("rules-", "is missing", "bank.repair()")):
        opened.read(QUESTIONS, groups=[["red"]] * 2)
    assert opened.read(QUESTIONS, groups=[["blue"]] * 2)
    report = opened.repair()
    assert files(bank.path / "shards") == before
    assert (
        list(report.damaged) == ["rules"]
        and len(report.orphans) == 2
        and report.lost["rules"] == ["handbook", "menu"]
    )
    opened.add({"new": "Some words of a new text."}, "blue", "new")
    opened.forget("visit")
    assert {name: data for name, data in files(bank.path / "shards").items() if "rules" in name} == {
        name: data for name, data in before.items() if "rules" in name
    }
    (bank.path / "bank.json").unlink()
    with pytest.warns(UserWarning, match="was made again"):
        taken_up = makes.open(repair=True)
    assert [m.name for m in taken_up.list()] == ["new", "rules", "vault"] and files(
        folder_of(bank, "vault")
    ) == vault


def test_a_bank_json_without_shards(makes, bank):
    before = files(bank.path / "shards")
    rewrite(bank, shards={})
    opened = makes.open()
    opened.add(some("secret"), "red", "vault")
    opened.forget("secret")
    assert files(bank.path / "shards") == before and opened.list() == []
    assert len(opened.repair().orphans) == 2
