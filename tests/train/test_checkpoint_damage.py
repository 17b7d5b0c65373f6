"""Damaged checkpoints: told and set aside, and the run goes on from the one before to the same end, bit for bit.

`MEMLAYERS_FUZZ=500` tries so many damages.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlayers.files import DamagedFile
from memlayers.train.resume import EarlierFormat
from memlayers.train.run import train
from tests.train.remains import remains

FUZZ = int(os.environ.get("MEMLAYERS_FUZZ", "40"))
NEWEST, BEFORE = "step-00000006", "step-00000004"
MARK = ".memlayers-checkpoint.json"


@pytest.fixture
def finished(config, tmp_path):
    """A function: a fresh copy of a finished run with checkpoints at steps 2, 4 and 6, and the run's config."""
    run = config(checkpoint_every=2, keep_checkpoints=3)
    train(run)
    out = Path(run.output_dir)
    shutil.copytree(out, tmp_path / "kept")

    def fresh():
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        return run, out

    return fresh


def flip(path: Path, rng: random.Random, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: Path, rng: random.Random, _: Path) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    zeros = data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    path.write_bytes(zeros if zeros != data else b"\1" + data[1:])


def swap(path: Path, rng: random.Random, older: Path) -> None:
    if (older / path.name).read_bytes() == path.read_bytes():  # the counts of a model without tables
        return cut(path, rng, older)
    shutil.copy(older / path.name, path)


def recast(path: Path, rng: random.Random, older: Path) -> None:
    if path.suffix != ".safetensors" or not (tensors := load_file(path)):
        return flip(path, rng, older)
    name = rng.choice(sorted(tensors))
    dtype = rng.choice([torch.int32, torch.bfloat16, torch.float64])
    save_file({**{n: t.clone() for n, t in tensors.items()}, name: tensors[name].to(dtype)}, path)


def not_finite(path: Path, rng: random.Random, older: Path) -> None:
    if path.suffix != ".safetensors" or not (tensors := load_file(path)):
        return flip(path, rng, older)
    name = rng.choice(sorted(tensors))
    tensors = {n: t.clone() for n, t in tensors.items()}
    tensors[name] = torch.full_like(tensors[name].float(), rng.choice([float("nan"), float("inf")]))
    save_file(tensors, path)


def remove(path: Path, rng: random.Random, _: Path) -> None:
    path.unlink()


def other_json(path: Path, rng: random.Random, older: Path) -> None:
    if path.suffix == ".safetensors":
        return flip(path, rng, older)
    data = json.loads(path.read_text())
    data[rng.choice(sorted(data))] = rng.choice([None, [], {}, 5, "x", -1, True])
    path.write_text(json.dumps(data))


def as_folder(path: Path, rng: random.Random, _: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path, rng: random.Random, older: Path) -> None:
    path.unlink()
    path.symlink_to(older / path.name)


DAMAGES = [flip, flip, flip, cut, zero, swap, recast, not_finite, remove, other_json, as_folder, as_link]


@pytest.mark.slow
def test_damage_is_told_and_the_run_goes_on_from_the_one_before(finished, capsys):
    rng, expected = random.Random(FUZZ), None
    for _ in range(FUZZ):
        run, out = finished()
        expected = expected or remains(out)
        newest, older = out / "checkpoints" / NEWEST, out / "checkpoints" / BEFORE
        path = rng.choice(sorted(p for p in newest.iterdir() if p.name != MARK))
        damage = rng.choice(DAMAGES)
        damage(path, rng, older)
        damaged = {p.name: p.read_bytes() for p in newest.iterdir() if p.is_file()}
        train(run, resume=True)
        told, case = capsys.readouterr().out, (damage.__name__, path.name)
        assert path.name in told.splitlines()[0], case
        assert f"set aside as damaged-{NEWEST}" in told, case
        assert f"resuming from {older} at step 4" in told, case
        aside = out / "checkpoints" / f"damaged-{NEWEST}"
        assert damaged == {p.name: p.read_bytes() for p in aside.iterdir() if p.is_file()}, case
        assert remains(out) == expected, case


@pytest.mark.parametrize(
    "text", ["[]", "null", "5", '"x"', "{}", '{"a": null}', '{"state.json": true}', "[" * 10**5]
)
def test_complete_that_is_something_else(finished, text, capsys):
    run, out = finished()
    expected = remains(out)
    (out / "checkpoints" / NEWEST / "COMPLETE").write_text(text)
    train(run, resume=True)
    assert f"{NEWEST}/COMPLETE" in capsys.readouterr().out
    assert remains(out) == expected


def test_none_whole_is_an_error_and_no_new_start(finished, config):
    run, out = finished()
    for path in out.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(
            DamagedFile, match=rf"no checkpoint in .* is whole \(.*{NEWEST}/model\.safetensors"
        ):
            train(run, resume=True)
    with pytest.raises(FileExistsError, match="already has 3 checkpoints"):
        train(run)
    for name in ("step-00000002", BEFORE):
        shutil.rmtree(out / "checkpoints" / name)
    (out / "checkpoints" / NEWEST).rename(out / "checkpoints" / f"damaged-{NEWEST}")
    with pytest.raises(DamagedFile, match=rf"damaged-{NEWEST} was set aside"):
        train(run, resume=True)
    train(config(checkpoint_every=2, keep_checkpoints=3, overwrite=True))
    assert sorted(p.name for p in (out / "checkpoints").glob("*step*")) == ["step-00000002", BEFORE, NEWEST]


def test_a_checkpoint_under_the_name_of_another(finished, capsys):
    run, out = finished()
    expected = remains(out)
    shutil.rmtree(out / "checkpoints" / NEWEST)
    shutil.copytree(out / "checkpoints" / "step-00000002", out / "checkpoints" / NEWEST)
    train(run, resume=True)
    assert "COMPLETE belongs to step 2" in capsys.readouterr().out
    assert remains(out) == expected


def test_old_checkpoints_go_only_when_a_whole_one_stands(finished, config):
    _, out = finished()
    (out / "checkpoints" / NEWEST / "model.safetensors").write_bytes(b"")
    train(config(checkpoint_every=2, keep_checkpoints=1, max_steps=8), resume=True)
    names = sorted(p.name for p in (out / "checkpoints").glob("*step*"))
    assert names == [f"damaged-{NEWEST}", "step-00000008"]


def as_earlier_version(out: Path) -> None:
    """No marks, sizes alone in COMPLETE, JSON and tensors without checksums."""
    (out / ".memlayers-run.json").unlink()
    (out / "checkpoints" / ".memlayers-run.json").unlink()
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / MARK).unlink()
        for path in checkpoint.glob("*.json"):
            data = json.loads(path.read_text())
            data.pop("checksum", None)
            data.get("progress", {}).pop("log_checksum", None)
            path.write_text(json.dumps(data))
        for path in checkpoint.glob("*.safetensors"):
            save_file({name: t.clone() for name, t in load_file(path).items()}, path)
        (checkpoint / "COMPLETE").unlink()
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        (checkpoint / "COMPLETE").write_text(json.dumps(sizes))


def test_a_run_of_an_earlier_version(finished, capsys):
    run, out = finished()
    expected = remains(out)
    as_earlier_version(out)
    for how in ({}, {"resume": True}, {"resume": True, "verify": False}):
        with pytest.raises(
            FileExistsError, match="of an earlier version of memlayers: go on with --resume --no-verify"
        ):
            train(run, **how)
    shutil.rmtree(out / "final")
    (out / "curve.png").unlink()
    shutil.rmtree(out / "checkpoints" / NEWEST)
    train(run, resume=True, verify=False)
    assert remains(out) == expected
    shutil.rmtree(out / "checkpoints" / NEWEST)
    with pytest.raises(EarlierFormat, match="without checksums"):
        train(run, resume=True)
