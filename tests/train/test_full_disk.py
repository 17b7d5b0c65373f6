"""A full disk: an error that says what was being written, all that was there whole, nothing left over, and on it goes."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from memlayers.train import run as run_module
from memlayers.train.checkpoints import checkpoints_in
from memlayers.train.resume import check_whole
from memlayers.train.run import train
from tests.disks import mounted_disk
from tests.train.faults import (
    full_for_process_0,
    full_for_process_1,
    small_files_from_checkpoint_4,
    small_files_from_final,
)
from tests.train.kill_cases import run_ranks
from tests.train.remains import assert_equal


@pytest.fixture
def small_disk(tmp_path):
    """A function: a folder on a disk of so many KB."""
    with ExitStack() as stack:
        yield lambda kilobytes: stack.enter_context(mounted_disk(tmp_path / "disk", kilobytes))


def left_over(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if ".tmp" in p.name or p.name.startswith(".memlayers-new")]


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


@pytest.mark.parametrize("kilobytes", [300, 900, 1500])
def test_a_small_disk(config, tmp_path, small_disk, kilobytes):
    """Too small for one checkpoint, for two, and for the trained model beside them."""
    changes = {"checkpoint_every": 2, "keep_checkpoints": 2}
    disk, straight = small_disk(kilobytes), tmp_path / "straight"
    train(config(**changes, output_dir=str(straight)))
    run = config(**changes, output_dir=str(disk / "out"))
    with pytest.raises(OSError, match=rf"cannot write {disk}/out/\S+: No space left on device"):
        train(run)
    for checkpoint in checkpoints_in(disk / "out" / "checkpoints"):
        check_whole(checkpoint)
    assert not left_over(disk)
    assert not (disk / "out" / "final").exists()
    resize(disk, 20_000)
    train(run, resume=True)
    assert_equal(straight, disk / "out")


@pytest.mark.parametrize("at", ["checkpoint", "final"])
def test_a_limit_on_the_size_of_files(config, tmp_path, at):
    run = config(checkpoint_every=2)
    out = Path(run.output_dir)
    before = small_files_from_final if at == "final" else small_files_from_checkpoint_4
    assert run_ranks(run, before=before) == [1]
    told = Path(f"{out}-rank0.txt").read_text()
    assert "File too large" in told
    assert f"OSError: [Errno 27] cannot write {out}/{'final' if at == 'final' else 'checkpoints'}" in told
    kept = checkpoints_in(out / "checkpoints")
    assert [path.name for path in kept] == [f"step-0000000{n}" for n in ((4, 6) if at == "final" else (2,))]
    for checkpoint in kept:
        check_whole(checkpoint)
    assert not left_over(out)
    assert not (out / "final").exists()
    assert run_ranks(config(checkpoint_every=2, output_dir=str(tmp_path / "straight"))) == [0]
    assert run_ranks(run) == [0]
    assert_equal(tmp_path / "straight", out)


@pytest.mark.parametrize("name", ["log.jsonl", "timing.jsonl"])
def test_a_log_that_cannot_be_written(config, tmp_path, monkeypatch, name):
    run, write = config(checkpoint_every=2), os.write
    train(config(checkpoint_every=2, output_dir=str(tmp_path / "straight")))
    lines = run_module.Logs.write

    def full(self, line, timing):
        if line["step"] == 5:
            file = self.log if name == "log.jsonl" else self.timing
            write(file.file.fileno(), b'{"step": 5, "lo')  # what fits on the disk
            file.file.close()
            file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        lines(self, line, timing)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Logs, "write", full)
        with pytest.raises(OSError, match=rf"cannot write .*{name}: No space left on device"):
            train(run)
    train(run, resume=True)
    assert_equal(tmp_path / "straight", tmp_path / "out")
    whole = (tmp_path / "out" / "timing.jsonl").read_text().splitlines()
    assert all(line.startswith('{"step"') and line.endswith("}") for line in whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_cannot_write_all_stop(config, rank):
    run = config(num_processes=2, checkpoint_every=2)
    assert run_ranks(run, 2, before=[full_for_process_0, full_for_process_1][rank]) == [1, 1]
    told = [Path(f"{run.output_dir}-rank{n}.txt").read_text() for n in range(2)]
    assert f"OtherProcessFailed: process {rank} of this run failed: OSError: " in told[1 - rank]
    assert [path.name for path in checkpoints_in(Path(run.output_dir) / "checkpoints")] == ["step-00000002"]
    assert not left_over(Path(run.output_dir))
    assert run_ranks(run, 2) == [0, 0]
