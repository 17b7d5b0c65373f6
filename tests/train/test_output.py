"""`output_dir`: it is touched last, and nothing in it is replaced or removed that a run has not written."""

import os
import socket
from pathlib import Path

import pytest
from killing import contents

import memlayers as ml
from memlayers.files import FolderInUse
from memlayers.train.output import LOCK, MARK, Output
from memlayers.train.run import train

SHORT = {"max_steps": 2, "checkpoint_every": 1}


def fill(path: Path) -> None:
    """A file of the user's, or a folder with some."""
    if path.suffix:
        path.write_text('"mine"\n')
    else:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "thesis.pdf").write_text("mine")
        (path / "model.safetensors").write_text("mine")


def unchanged(before: dict, folder: Path) -> bool:
    after = contents(folder)
    return all(after.get(name) == content for name, content in before.items())


@pytest.mark.parametrize(
    "name",
    ["checkpoints", "checkpoints/checkpoint-500", "final", "start", "log.jsonl", "timing.jsonl", "curve.png"],
)
@pytest.mark.parametrize(
    "how", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "verify": False}]
)
def test_where_no_run_was_the_names_of_a_run_are_those_of_others(config, tmp_path, name, how):
    out = tmp_path / "out"
    out.mkdir()
    fill(out / name)
    before = contents(out)
    run = config(**SHORT, overwrite=how.get("overwrite", False))
    with pytest.raises(FileExistsError, match="was not made by this memlayers train"):
        train(run, resume=how.get("resume", False), verify=how.get("verify", True))
    assert contents(out) == before


def test_other_files_in_output_dir_stay(config, tmp_path):
    out = tmp_path / "out"
    fill(out / "notes")
    (out / "log.txt").write_text("mine")
    before = contents(out)
    train(config(**SHORT))
    train(config(**SHORT, overwrite=True))
    assert unchanged(before, out)


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_folders_of_others_between_the_checkpoints_stay(config, tmp_path, how):
    train(config(**SHORT))
    checkpoints = tmp_path / "out" / "checkpoints"
    names = [
        "best-so-far",
        ".tmp-step-00000003",
        "step-1",
        "damaged-step-00000001",
        ".tmp-step-00000001-0123456789abcdef",
    ]
    for name in names:
        fill(checkpoints / name)
    fill(tmp_path / "out" / "final" / "mine")
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere" / "data")
    (checkpoints / "link").symlink_to(tmp_path / "elsewhere" / "data")
    before = {name: contents(checkpoints / name) for name in names}
    train(config(**{**SHORT, "max_steps": 4}, overwrite=how == "overwrite"), resume=how == "resume")
    assert before == {name: contents(checkpoints / name) for name in names}
    assert (tmp_path / "out" / "final" / "mine" / "deep" / "thesis.pdf").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "data" / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("how", ["resume", "overwrite"])
@pytest.mark.parametrize("kind", ["folder", "link", "file", "socket"])
def test_what_has_the_name_of_a_checkpoint_and_is_none_stops_the_run(config, tmp_path, how, kind):
    train(config(**SHORT))
    out, place = tmp_path / "out", tmp_path / "out" / "checkpoints" / "step-00000003"
    stand(kind, place, tmp_path / "elsewhere")
    before, elsewhere = contents(out), contents(tmp_path / "elsewhere")
    with pytest.raises(
        FileExistsError, match="step-00000003 has the name of a checkpoint and is none of ours"
    ):
        train(config(**{**SHORT, "max_steps": 4}, overwrite=how == "overwrite"), resume=how == "resume")
    assert (contents(out), contents(tmp_path / "elsewhere")) == (before, elsewhere)


@pytest.mark.parametrize("kind", ["folder", "link", "socket"])
@pytest.mark.parametrize("name", ["checkpoints", "final", "log.jsonl", "timing.jsonl", "curve.png"])
def test_what_took_the_place_of_ours_is_not_touched(config, tmp_path, name, kind):
    train(config(**SHORT))
    out, place = tmp_path / "out", tmp_path / "out" / name
    if name == "final" and kind == "folder":
        pytest.skip("files of others in final/ are looked at one by one")
    place.rename(tmp_path / "moved")
    stand(kind, place, tmp_path / "elsewhere")
    before, elsewhere = contents(out), contents(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=rf"{name} (is a link or no|was not made)"):
        train(config(**SHORT, overwrite=True))
    assert (contents(out), contents(tmp_path / "elsewhere")) == (before, elsewhere)


def stand(kind: str, place: Path, elsewhere: Path) -> None:
    fill(elsewhere)
    if kind == "folder":
        fill(place / "his")
    elif kind == "link":
        place.symlink_to(elsewhere)
    elif kind == "file":
        place.write_text("mine")
    else:
        here = os.getcwd()
        os.chdir(place.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
        os.chdir(here)


@pytest.mark.parametrize("name", ["final/README.md", "curve.png"])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_files_of_ours_that_were_changed_by_hand_are_not_replaced(config, tmp_path, name, how):
    train(config(**SHORT))
    (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=rf"{name} is not ours, or was changed"):
        train(config(**SHORT, overwrite=how == "overwrite"), resume=how == "resume")
    assert contents(tmp_path / "out") == before


def test_a_log_that_is_none_is_not_overwritten(config, tmp_path):
    train(config(**SHORT))
    (tmp_path / "out" / "log.jsonl").write_text("my notes\n")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="is no log of a run"):
        train(config(**SHORT, overwrite=True))
    assert contents(tmp_path / "out") == before


def test_a_finished_run_stays_until_the_next_is_ready(config, tmp_path):
    """Its checkpoints deleted to save space, then a mistyped run, a run without its data, and --resume."""
    train(config(**SHORT))
    out = tmp_path / "out"
    for name in ("step-00000001", "step-00000002"):
        for path in (out / "checkpoints" / name).iterdir():
            path.unlink()
        (out / "checkpoints" / name).rmdir()
    before = contents(out)
    wrong = {"model": {"path": str(tmp_path / "nowhere")}}
    with pytest.raises(FileExistsError, match="final already has a trained model"):
        train(config(**SHORT, **wrong))
    with pytest.raises(FileNotFoundError, match=r"^model\.path"):
        train(config(**SHORT, **wrong, overwrite=True))
    with pytest.raises(FileNotFoundError, match=r"^model\.path"):
        train(config(**SHORT, **wrong), resume=True)
    with pytest.raises(FileExistsError, match="there is no checkpoint in"):
        train(config(**SHORT), resume=True)
    no_text = {"data": {"type": "text", "files": [str(tmp_path / "no.txt")], "length": 16}}
    with pytest.raises(ml.ConfigError, match=r"^data\.files"):
        train(config(**SHORT, **no_text, overwrite=True))
    after = contents(out)
    assert {n: c for n, c in after.items() if n != LOCK} == {n: c for n, c in before.items() if n != LOCK}


def test_a_run_that_cannot_start_makes_no_folder(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^model\.path"):
        train(config(**SHORT, model={"path": str(tmp_path / "nowhere")}, trackers=["tensorboard"]))
    assert not (tmp_path / "out").exists()


def test_files_of_an_older_model_that_the_new_one_has_not_go(config, fields, tmp_path):
    final = train(config(**SHORT))
    (final / "notes.txt").write_text("mine")
    assert (final / "base" / "model.safetensors").exists()
    train(config(**SHORT, train_what="memory", overwrite=True))
    assert not (final / "base").exists()
    assert (final / "notes.txt").read_text() == "mine"
    assert ml.memories(ml.load(final))


def test_one_run_a_folder(config, tmp_path):
    train(config(**SHORT))
    before = contents(tmp_path / "out")
    with Output(tmp_path / "out", True, False).hold():
        with pytest.raises(FolderInUse, match=rf"{tmp_path / 'out'} is in use by process {os.getpid()} "):
            train(config(**{**SHORT, "max_steps": 4}), resume=True)
    assert contents(tmp_path / "out") == before


def test_a_damaged_mark_is_told(config, tmp_path):
    train(config(**SHORT))
    mark = tmp_path / "out" / MARK
    mark.write_text(mark.read_text().replace("memlayers train", "memlayers trai n"))
    with pytest.raises(ValueError, match=rf"{MARK}: not as it was written"):
        train(config(**SHORT), resume=True)
    train(config(**SHORT), resume=True, verify=False)
