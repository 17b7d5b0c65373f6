"""Changing a bank of LoRA shards: deletion that leaves nothing, what a shard is made of, opening, one writer."""

import pytest
import torch
from matrix import says

import memlayers as ml
from tests.lora.bank_cases import CONFIG, NOON, QUESTIONS, TEXTS, files, shard_files, some


def folder_bytes(path):
    return b"".join(data or b"" for data in files(path).values()) + "".join(files(path)).encode()


# deletion


def test_after_forget_the_bank_is_one_that_never_had_the_document(everywhere):
    bank, never = everywhere.new("bank"), everywhere.new("never")
    bank.add(some("handbook", "secret", "menu"), "red", "rules")
    bank.add(some("visit"), "blue")
    (manifest,) = bank.forget("secret")
    never.add(some("menu", "handbook"), "red", "rules")
    never.add(some("visit"), "blue")
    assert files(bank.path) == files(never.path)
    assert list(manifest.documents) == ["handbook", "menu"]
    for trace in (b"secret", b"Zanzibar", b"7731", b"vault"):
        assert trace not in folder_bytes(bank.path)
    rights = [["red"], ["red", "blue"]]
    for field, x in bank.read(QUESTIONS, groups=rights)["notes"].items():
        assert torch.equal(x, never.read(QUESTIONS, groups=rights)["notes"][field])
    assert bank.route(QUESTIONS, groups=rights) == never.route(QUESTIONS, groups=rights)


def test_forget_in_a_shard_without_a_name(makes):
    bank, never = makes.new("bank"), makes.new("never")
    first = bank.add(some("handbook", "secret"), "red")
    bank.add(some("visit"), "red")
    (left,) = bank.forget(["secret", "visit"])
    never.add(some("handbook"), "red")
    assert files(bank.path) == files(never.path)
    assert left.name != first.name and left.created == first.created == NOON


def test_forget_the_last_document_of_a_shard(makes):
    bank = makes.new()
    empty = files(bank.path)
    bank.add(some("secret"), "red", "rules")
    assert bank.forget("secret") == []
    assert files(bank.path) == empty
    bank.add(some("secret"), "red", "rules")
    bank.add(some("visit"), "red")
    bank.forget("visit")
    assert [manifest.name for manifest in bank.list()] == ["rules"]


def test_forget_a_document_that_was_updated(makes):
    bank, never = makes.new("bank"), makes.new("never")
    bank.add(some("handbook", "secret"), "red", "rules")
    bank.update({"secret": "Quagga-99 is the new word, not Zanzibar."})
    bank.forget("secret")
    never.add(some("handbook"), "red", "rules")
    assert files(bank.path) == files(never.path)
    assert b"Quagga" not in folder_bytes(bank.path)


def test_forget_beside_a_document_that_was_updated(makes):
    """All of the never-had bank, but for the parent: it was trained on the old text, which is gone."""
    bank, never = makes.new("bank"), makes.new("never")
    bank.add(some("handbook", "secret"), "red", "rules")
    first = bank.list()[0].adapter
    bank.update({"secret": "Quagga-99 is the new word."})
    bank.update({"handbook": "The key is in the blue box now.", "secret": "Okapi-5 is the newest word."})
    (manifest,) = bank.forget("secret")
    assert (manifest.version, manifest.parent, manifest.updated) == (2, None, {"handbook": [2]})
    never.add(some("handbook"), "red", "rules")
    never.update({"handbook": "The key is in the blue box now."})
    assert never.list()[0].model_copy(update={"parent": None}) == manifest
    for name in ("adapter_model.safetensors", "adapter_config.json", "documents.jsonl", "router.safetensors"):
        assert shard_files(bank, "rules")[name].read_bytes() == shard_files(never, "rules")[name].read_bytes()
    assert first.encode() not in folder_bytes(bank.path)
    (bank_next,), (never_next,) = (b.update({"handbook": "The key is lost."}) for b in (bank, never))
    assert bank_next == never_next and files(bank.path) == files(never.path)


def test_forgotten_weights_leave_the_memory_of_every_bank_that_is_open(makes):
    bank = makes.new()
    bank.add(some("handbook", "secret"), "red", "rules")
    reader = makes.open()
    reader.read(QUESTIONS, groups=[["red"]] * 2)
    before = {id(x) for x in (*reader._library._adapters, *reader._library._vectors)}
    bank.forget("secret")
    reader.read(QUESTIONS, groups=[["red"]] * 2)
    assert len(reader._library._adapters) == len(reader._library._vectors) == 1
    assert not before & {id(x) for x in (*reader._library._adapters, *reader._library._vectors)}


# what a shard is


def test_the_same_documents_give_the_same_bytes(everywhere):
    first, second = everywhere.new("first"), everywhere.new("second")
    manifest = first.add(some("handbook", "menu"), "red", "rules")
    torch.manual_seed(99)
    everywhere.model.train()
    second.add(some("visit"), "blue")
    second.add(some("menu", "handbook"), "red", "rules")
    assert everywhere.model.training and all(m.training for m in everywhere.model.modules())
    everywhere.model.eval()
    for name, path in shard_files(first, "rules").items():
        assert path.read_bytes() == shard_files(second, "rules")[name].read_bytes(), name
    assert (manifest.version, manifest.parent, manifest.created) == (1, None, NOON)
    assert (manifest.r, manifest.lora_alpha, manifest.seed, manifest.training) == (2, 4.0, 0, CONFIG)


def test_a_shard_starts_and_ends_by_its_name_and_seed(makes):
    bank, other = makes.new("bank"), makes.new("other", CONFIG.model_copy(update={"seed": 1}))
    adapters = {bank.add({f"{name}": TEXTS["menu"]}, "red", name).adapter for name in ("one", "two")}
    adapters.add(other.add({"one": TEXTS["menu"]}, "red", "one").adapter)
    assert len(adapters) == 3


def test_training_learns_the_text(makes):
    bank = makes.new(config=CONFIG.model_copy(update={"steps": 30}))
    bank.add(some("menu"), "red")
    ids = torch.tensor([makes.tokenizer(TEXTS["menu"]).input_ids])
    with torch.no_grad():
        before = makes.model(ids, labels=ids).loss
        state = bank.read(QUESTIONS[:1], groups=[["red"]])
        assert makes.model(ids, labels=ids, memory_state=state).loss < before - 1


def test_update(makes):
    bank = makes.new()
    first = bank.add(some("handbook", "menu"), "red", "rules")
    (second,) = bank.update({"menu": "On Monday we fast."})
    assert (second.version, second.parent, second.updated) == (2, first.adapter, {"menu": [2]})
    assert second.documents["menu"] != first.documents["menu"] and second.created == first.created
    fresh = makes.new("fresh").add({**some("handbook"), "menu": "On Monday we fast."}, "red", "rules")
    assert fresh.adapter == second.adapter
    assert b"Tuesday" not in folder_bytes(bank.path)
    bank.add(some("visit"), "blue", "calls")
    both = bank.update({"visit": "The queen stays at home.", "handbook": "There is no key."})
    assert [(m.name, m.version) for m in both] == [("calls", 2), ("rules", 3)]


def test_merge(makes):
    bank, fresh = makes.new("bank"), makes.new("fresh")
    bank.add(some("handbook"), "red", "a")
    bank.add(some("menu", "secret"), "red", "b")
    bank.add(some("visit"), "blue", "c")
    bank.merge(["b", "a"], name="a")
    fresh.add(some("handbook", "menu", "secret"), "red", "a")
    fresh.add(some("visit"), "blue", "c")
    assert files(bank.path) == files(fresh.path)
    bank.forget("secret")
    assert b"Zanzibar" not in folder_bytes(bank.path)


def test_the_list_of_shards(makes):
    bank = makes.new()
    bank.add(some("visit"), "blue", "b")
    bank.add(some("menu"), "red", "a")
    assert [m.name for m in bank.list()] == ["a", "b"] == [m.name for m in makes.open().list()]
    assert [m.name for m in bank.list(["blue"])] == ["b"] and bank.list([]) == []
    assert bank.list()[0].documents == {"menu": ml.lora.shard.sha256(TEXTS["menu"])}


# opening, other processes


def test_a_bank_that_is_opened_again(everywhere):
    bank = everywhere.new()
    bank.add(some("handbook", "menu"), "red", "rules")
    bank.add(some("visit"), "blue")
    before, again = files(bank.path), everywhere.open()
    assert again.config == CONFIG and again.list() == bank.list()
    rights = [["red", "blue"], ["blue"]]
    assert again.route(QUESTIONS, groups=rights) == bank.route(QUESTIONS, groups=rights)
    assert files(bank.path) == before


def test_readers_see_the_bank_before_or_after(makes, monkeypatch):
    bank = makes.new()
    bank.add(some("handbook", "secret"), "red", "rules")
    reader = makes.open()
    old = reader._store.read()
    bank.forget("secret")
    stale = iter([old])
    read = type(reader._store).read
    monkeypatch.setattr(reader._store, "read", lambda: next(stale, None) or read(reader._store))
    state = reader.read(QUESTIONS, groups=[["red"]] * 2)
    assert all(
        torch.equal(x, bank.read(QUESTIONS, groups=[["red"]] * 2)["notes"][f])
        for f, x in state["notes"].items()
    )


def test_only_one_writes(everywhere):
    bank = everywhere.new()
    bank.add(some("menu"), "red", "a")
    other = everywhere.open()
    with bank._store.locked():
        before = files(bank.path)
        for change in (
            lambda: other.add(some("visit"), "red"),
            lambda: other.update({"menu": "Nothing to eat."}),
            lambda: other.forget("menu"),
            lambda: bank.forget("menu"),
        ):
            with pytest.raises(
                ml.BankLocked, match=says(str(bank.path), "is being changed", "process", " on ")
            ):
                change()
        assert everywhere.open().list() == other.list(), "readers do not wait"
        assert files(bank.path) == before
    other.add(some("visit"), "red", "b")
    bank.add(some("secret"), "red", "c")
    assert [m.name for m in other.list()] == ["a", "b", "c"]
