"""A bank deletes and changes nothing that it did not write: files of the user beside its own, links, sockets, pipes."""

import os
import shutil
import socket

import pytest
from matrix import says

import memlayers as ml
from memlayers.files import DamagedFile
from tests.lora.bank_cases import QUESTIONS, TEXTS, files, found_in, rewrite, shard_files, some, traces

OURS = (
    "manifest.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "documents.jsonl",
    "router.safetensors",
)


def fill(folder):
    """Everything that a user may have in a folder; what it looks like, links by their targets."""
    before = look(folder)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "final.tex").write_text("ten years of work")
    (folder / "photo.jpg").write_bytes(b"x")
    (folder / ".bank.json.x.tmp").mkdir()
    (folder / ".bank.json.memlayers-0123456789abcdef.tmp").mkdir()
    (folder / ".bank.json.memlayers-1123456789abcdef.tmp").symlink_to(folder / "photo.jpg")
    (folder / ".mine-0123456789abcdef.tmp").mkdir()
    (folder / "mine-0123456789abcdef").mkdir()
    for name in OURS:
        (folder / "mine-0123456789abcdef" / name).write_text("not of this bank")
    (folder / "linked-0123456789abcdef").symlink_to(folder / "thesis")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket"))
    return {path: seen for path, seen in look(folder).items() if path not in before}


def look(folder):
    """Every name under a folder, with mode, time and bytes; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink() and path.name != ".lock"
        found[str(path)] = (
            os.lstat(path).st_mode,
            os.lstat(path).st_mtime_ns if is_file else 0,
            is_file and path.read_bytes(),
        )
    return found


def use(makes, bank):
    """Everything that can be done with a bank."""
    bank.add(some("secret"), "red", "more")
    bank.update({"menu": "Nothing to eat."})
    bank.merge(["rules", "more"], "all")
    bank.forget(["secret", "menu"])
    shard_files(bank, "all")["router.safetensors"].write_bytes(b"")
    assert bank.repair().mended.keys() == {"all"}
    makes.open().read(QUESTIONS, groups=[["red", "blue"]] * 2)


@pytest.mark.parametrize("place", ["", "shards"])
def test_files_of_the_user_in_a_bank(makes, bank, place, monkeypatch):
    monkeypatch.chdir(makes.folder)  # sockets have short names
    mine = fill(bank.path / place)
    use(makes, bank)
    after = look(bank.path / place)
    assert {path: after.get(path) for path in mine} == mine
    unknown = set(bank.repair(dry_run=True).unknown)
    prefix = f"{place}/" if place else ""
    assert {f"{prefix}thesis", f"{prefix}socket", f"{prefix}mine-0123456789abcdef"} <= unknown


@pytest.mark.parametrize("name", ["shards", "shards/mine", ".lock", ".hidden", "bank.json", "a"])
def test_a_bank_is_made_in_no_folder_that_holds_something(makes, name):
    path = makes.folder / "bank" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name.startswith("shards") else path.write_text("mine")
    before = look(makes.folder)
    with pytest.raises(FileExistsError, match=r"is not empty|is a bank already"):
        makes.new()
    assert look(makes.folder) == before


def test_a_bank_that_cannot_be_made_leaves_nothing(makes, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memlayers.lora.store.write_index", full)
    with pytest.raises(OSError, match="No space"):
        makes.new()
    assert not (makes.folder / "bank").exists()
    (makes.folder / "bank").mkdir()
    with pytest.raises(OSError, match="No space"):
        makes.new()
    assert files(makes.folder / "bank") == {}


# links in the place of what is ours


@pytest.fixture
def victim(makes):
    folder = makes.folder / "victim"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "final.tex").write_text("ten years of work")
    for name in OURS:
        (folder / name).write_text("mine")
    before = look(folder)
    yield folder
    assert look(folder) == before


def test_shards_is_a_link(makes, bank, victim):
    shutil.rmtree(bank.path / "shards")
    (bank.path / "shards").symlink_to(victim)
    before = look(bank.path)
    for use_it in (
        makes.open,
        lambda: makes.open(repair=True),
        bank.list,
        bank.repair,
        lambda: bank.add(some("secret"), "red"),
        lambda: bank.forget("menu"),
        lambda: bank.read(QUESTIONS, groups=[["red"]] * 2),
    ):
        with pytest.raises(DamagedFile, match=says(str(bank.path / "shards"), "is a link")):
            use_it()
    assert look(bank.path) == before


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_the_lock_is_a_link(makes, bank, victim, link):
    (bank.path / ".lock").unlink()
    link(victim / "documents.jsonl", bank.path / ".lock")
    before = os.lstat(victim / "documents.jsonl").st_nlink
    makes.open().read(QUESTIONS, groups=[["red"]] * 2)
    for change in (lambda: bank.add(some("secret"), "red"), lambda: bank.forget("menu"), bank.repair):
        with pytest.raises(FileExistsError, match=says(str(bank.path / ".lock"), "not touched")):
            change()
    assert os.lstat(victim / "documents.jsonl").st_nlink == before
    (bank.path / ".lock").unlink()
    bank.forget("menu")


def test_bank_json_is_a_link(makes, bank, victim):
    shutil.copy(bank.path / "bank.json", makes.folder / "elsewhere.json")
    (bank.path / "bank.json").unlink()
    (bank.path / "bank.json").symlink_to(makes.folder / "elsewhere.json")
    before = look(makes.folder)
    for use_it in (makes.open, bank.list, lambda: bank.forget("menu")):
        with pytest.raises(DamagedFile, match=says(str(bank.path / "bank.json"), "is a link")):
            use_it()
    assert look(makes.folder) == before


def test_bank_json_has_another_name(makes, bank):
    """The other name would go on saying what the bank held."""
    os.link(bank.path / "bank.json", makes.folder / "other")
    with pytest.raises(FileExistsError, match=says("bank.json has another name", "delete that one")):
        bank.forget("visit")
    assert {m.name for m in bank.list()} == {"rules", "calls"}
    (makes.folder / "other").unlink()
    bank.forget("visit")


def test_a_folder_of_a_shard_is_a_link(makes, bank):
    folder = shard_files(bank, "rules")["manifest.json"].parent
    shutil.move(folder, makes.folder / "elsewhere")
    folder.symlink_to(makes.folder / "elsewhere")
    before = look(makes.folder)
    for use_it in (
        bank.list,
        lambda: bank.read(QUESTIONS, groups=[["red"]] * 2),
        lambda: bank.export("rules", makes.folder / "out"),
        lambda: bank.update({"menu": "Nothing to eat."}),
    ):
        with pytest.raises((DamagedFile, FileExistsError), match=says(str(folder))):
            use_it()
    for documents in ("menu", ["menu", "handbook"]):
        with pytest.raises(
            FileExistsError, match=says(str(folder), "is a link", "delete the target", "Nothing")
        ):
            bank.forget(documents)
    assert bank.repair().damaged.keys() == {"rules"}
    assert look(makes.folder) == before
    assert [m.name for m in bank.list(["blue"])] == ["calls"]
    shutil.rmtree(makes.folder / "elsewhere")
    folder.unlink()
    with pytest.warns(UserWarning, match=r"\['handbook'\] were damaged"):
        bank.forget("menu")
    assert found_in(makes.folder, traces(TEXTS["menu"], "menu")) == []


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", OURS)
def test_a_file_of_a_shard_is_a_link(makes, bank, name, link):
    path, elsewhere = shard_files(bank, "calls")[name], makes.folder / "elsewhere"
    shutil.move(path, elsewhere)
    link(elsewhere, path)
    before = look(makes.folder)
    for documents in ("visit", ["visit", "menu"]):
        with pytest.raises(
            FileExistsError, match=says(str(path), "would stay there" if link is os.link else "link")
        ):
            bank.forget(documents)
    with pytest.raises(FileExistsError):
        bank.update({"visit": "The queen stays at home."})
    assert look(makes.folder) == before
    (path if link is os.symlink else elsewhere).unlink()
    bank.forget("visit")
    if link is os.link:
        assert found_in(makes.folder, traces(TEXTS["visit"], "visit")) == []


def test_a_file_of_the_user_in_a_shard(makes, bank):
    folder = shard_files(bank, "calls")["manifest.json"].parent
    (folder / "notes.txt").write_text("mine")
    before = look(bank.path)
    with pytest.raises(
        FileExistsError, match=says("notes.txt is not ours", "move it away", "Nothing was changed")
    ):
        bank.forget("visit")
    assert look(bank.path) == before
    assert bank.repair().unknown == [f"shards/{folder.name}/notes.txt"]
    (folder / "notes.txt").rename(makes.folder / "notes.txt")
    bank.forget("visit")


def test_a_file_of_the_user_in_a_folder_that_is_to_go(makes, bank, monkeypatch):
    """Put there while a deletion is interrupted: ours go, the user's stays, and is told."""
    folder = shard_files(bank, "calls")["manifest.json"].parent
    with monkeypatch.context() as patch:
        patch.setattr("memlayers.lora.store.remove_folder", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            bank.forget("visit")
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to(makes.folder)
    with pytest.warns(UserWarning, match=says("cannot be", "link is not ours")):
        opened = makes.open()
    assert sorted(path.name for path in folder.iterdir()) == ["link", "notes.txt"]
    assert list(opened.repair().leftovers) == [f"shards/{folder.name}"]
    opened.add(some("secret"), "red", "more")
    shutil.rmtree(folder)
    makes.open()
    assert found_in(bank.path, traces(TEXTS["visit"], "visit", folder.name)) == []


def _interrupted(folder):
    raise KeyboardInterrupt


def test_a_folder_that_is_to_go_is_a_link(makes, bank, victim):
    name = "old-0123456789abcdef"
    (bank.path / "shards" / name).symlink_to(victim)
    rewrite(bank, leftovers=[name])
    with pytest.warns(UserWarning, match=says(name, "is a link")):
        makes.open()
    assert (bank.path / "shards" / name).is_symlink()


def test_a_folder_that_is_to_go_and_that_a_shard_has_stays(makes, bank):
    before = files(bank.path / "shards")
    rewrite(bank, leftovers=[entry.folder for entry in bank._store.read().shards.values()])
    makes.open()
    assert files(bank.path / "shards") == before and bank._store.read().leftovers == []


def test_something_in_the_place_of_a_new_shard(makes, bank):
    other = makes.new("other", config=bank.config)
    other.add(some("secret"), "red", "more")
    folder = shard_files(other, "more")["manifest.json"].parent
    target = bank.path / "shards" / folder.name
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    before = files(bank.path)
    with pytest.raises(FileExistsError, match=says(str(target), "move it away", "Nothing was changed")):
        bank.add(some("secret"), "red", "more")
    assert files(bank.path) == before
    shutil.rmtree(target)
    shutil.copytree(folder, target)
    assert bank.repair(dry_run=True).orphans == [f"shards/{folder.name}"]
    bank.add(some("secret"), "red", "more")
    assert bank.repair(dry_run=True) == ml.lora.BankReport(whole=["calls", "more", "rules"])


def test_the_whole_bank_is_behind_a_link(makes, bank):
    (makes.folder / "link").symlink_to(bank.path)
    linked = makes.open("link")
    linked.add(some("secret"), "red", "more")
    linked.forget("secret")
    assert {m.name for m in bank.list()} == {"rules", "calls"}
