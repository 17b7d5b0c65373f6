"""What a run leaves to look at: `log.jsonl`, `timing.jsonl` and `curve.png`."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Log:
    """One JSON object a line, in a file that a resumed run cuts back to where its checkpoint was.

    Args:
        path: the file.
        offset: bytes to keep; 0 starts anew.

    Raises:
        ValueError: the file is shorter than `offset`.
    """

    def __init__(self, path: Path, offset: int = 0):
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            raise ValueError(
                f"{path} has {size} bytes, the checkpoint expects {offset}: the log was cut or deleted; start anew "
                "with overwrite=true"
            )
        path.touch()
        self.file = path.open("r+b")
        self.file.truncate(offset)
        self.file.seek(offset)

    def write(self, line: dict) -> None:
        self.file.write((json.dumps(line) + "\n").encode())
        self.file.flush()

    def sync(self) -> int:
        """Flush to disk; returns the bytes written so far."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    figure.savefig(picture, dpi=120)
    plt.close(figure)
