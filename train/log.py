"""What a run leaves to look at: `log.jsonl`, `timing.jsonl` and `curve.png`."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import xxhash

from memlayers.files import DamagedFile, telling, write_whole

from .snapshot import Progress

LOG, TIMING, CURVE, USAGE = "log.jsonl", "timing.jsonl", "curve.png", "usage.png"


class Lines:
    """One JSON object a line, in a file that grows, and that a resumed run cuts back.

    Args:
        path: the file.
        keep: bytes that stay; 0 starts anew.

    Raises:
        FileExistsError: what stands at `path` is a link or no file.
        DamagedFile: the file is shorter than `keep`.
        OSError: it cannot be written; names it.
    """

    def __init__(self, path: Path, keep: int = 0):
        check_plain(path)
        self.path, self._digest = path, xxhash.xxh3_128()
        with telling(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            self.file = os.fdopen(
                handle, "r+b", buffering=0
            )  # nothing is left to be written when it is closed
        try:
            kept = self._read(keep)
            if len(kept) < keep:
                raise DamagedFile(
                    f"{path} has {len(kept)} bytes, the checkpoint expects {keep}: the log was cut or deleted; start "
                    "anew with overwrite=true"
                )
            self._digest.update(kept)
        except BaseException:
            self.close()
            raise

    def _read(self, n: int) -> bytes:
        parts = []
        while n and (part := self.file.read(n)):
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def cut(self) -> None:
        """Drop all that follows the bytes that stay."""
        with telling(self.path):
            self.file.truncate(self.file.tell())

    def write(self, line: dict) -> None:
        """Append a line; raises OSError that names the file where the disk is full."""
        data = (json.dumps(line) + "\n").encode()
        self._digest.update(data)
        with telling(self.path):
            while data:
                data = data[self.file.write(data) :]

    def sync(self) -> tuple[int, str]:
        """Have it on disk; returns the bytes written so far, and their checksum."""
        with telling(self.path):
            os.fsync(self.file.fileno())
        return self.file.tell(), self.checksum

    @property
    def checksum(self) -> str:
        """Of the bytes up to here."""
        return self._digest.hexdigest()

    def close(self) -> None:
        self.file.close()


class Logs:
    """`log.jsonl`, the same bit for bit after any number of kills and resumes, and `timing.jsonl`, which is not.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def opened(self, progress: Progress, verify: bool = True) -> Iterator[None]:
        """Cut both back to where a run stands; while the context lasts they are written.

        Raises:
            DamagedFile: the log is not what the checkpoint was written with.
            FileExistsError, OSError: as `Lines`.
        """
        with ExitStack() as stack:
            self.log = stack.enter_context(closing(Lines(self.folder / LOG, progress.log_offset)))
            if verify and progress.log_offset and self.log.checksum != progress.log_checksum:
                raise DamagedFile(
                    f"{self.folder / LOG} is not as it was when the checkpoint was written. Put back a copy that is "
                    "whole, keep it as it is with --no-verify (verify=False), or start anew with overwrite=true"
                )
            kept = whole_lines(self.folder / TIMING) if progress.step else 0
            self.timing = stack.enter_context(closing(Lines(self.folder / TIMING, kept)))
            self.log.cut()
            self.timing.cut()
            yield

    def write(self, line: dict, timing: dict) -> None:
        """Append a line to each."""
        self.log.write(line)
        self.timing.write(timing)

    def sync(self) -> tuple[int, str]:
        """Have both on disk; returns the bytes of the log, and their checksum."""
        self.timing.sync()
        return self.log.sync()


def check_plain(path: Path) -> None:
    """Raise FileExistsError where something stands at `path` that is not a file with one name."""
    if os.path.lexists(path):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise FileExistsError(f"{path} is a link or no file of a run; it is not touched: move it away")


def whole_lines(path: Path) -> int:
    """Bytes up to the last end of a line: a kill may have left half of one."""
    return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0


def check_log(path: Path) -> None:
    """Raise FileExistsError unless what stands at `path` is nothing, empty, or begins as a log of a run does."""
    check_plain(path)
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    try:
        ours = "step" in json.loads(first)
    except (ValueError, TypeError, RecursionError):
        ours = not first.endswith(b"\n") and first.startswith(
            b'{"step":'
        )  # a kill has left half of the first
    if not ours:
        raise FileExistsError(
            f"{path} is no log of a run of memlayers train; it is not touched: move it away"
        )


def read_log(path: Path) -> list[dict]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_line(progress: Progress, rate: float, segments: int | None) -> dict:
    """Means since the last line. No times here: the log of a resumed run is the same bit for bit."""
    loss, accuracy, norm = (sum(column) / len(column) for column in zip(*progress.unlogged))
    return {
        "step": progress.step,
        "loss": loss,
        "accuracy": accuracy,
        "gradient_norm": norm,
        "learning_rate": rate,
        "stage_segments": segments,
        "tokens": progress.tokens,
    }


def draw_curve(log: Path, picture: Path) -> None:
    """Loss, accuracy and the curriculum's stage over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log)
    if not lines:
        return
    panels = ["loss", "accuracy"] + (["stage_segments"] if lines[0].get("stage_segments") is not None else [])
    figure, axes = plt.subplots(len(panels), 1, sharex=True, figsize=(8, 2.4 * len(panels)), squeeze=False)
    steps = [line["step"] for line in lines]
    for axis, panel in zip(axes[:, 0], panels):
        values = [line[panel] for line in lines]
        if panel == "stage_segments":
            axis.step(steps, values, where="post")
        else:
            axis.plot(steps, values)
        axis.set_ylabel("segments" if panel == "stage_segments" else panel)
        axis.grid(alpha=0.3)
        if panel == "accuracy":
            axis.set_ylim(-0.02, 1.02)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    write_whole(picture, lambda target: figure.savefig(target, format="png", dpi=120))
    plt.close(figure)
