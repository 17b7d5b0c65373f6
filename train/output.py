"""The folder that a run writes to: its mark, who holds it, and what in it may be replaced.

A folder that `memlayers train` has made says so in `.memlayers-run.json`, with the checksums of the files in final/ and
start/ and of the pictures. Nothing without that mark is written into, replaced or removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memlayers.config import ConfigError
from memlayers.files import (
    DamagedFile,
    check_ours,
    holding_file,
    make_folder,
    read_json,
    settle,
    together,
    write_json,
)
from memlayers.version import __version__

from .checkpoints import (
    checkpoints_in,
    clean,
    remove,
    set_aside,
    set_aside_in,
    strangers_in,
)
from .log import CURVE, LOG, TIMING, USAGE, check_log, check_plain
from .resume import newest_whole

MARK, LOCK = ".memlayers-run.json", ".memlayers-run.lock"
CHECKPOINTS, FINAL, START = "checkpoints", "final", "start"


class Output:
    """A run's folder, as the main process sees it.

    Args:
        folder: `output_dir`.
        resume: go on from a checkpoint that is there.
        overwrite: replace what an earlier run has left.
        verify: compare checksums.
    """

    def __init__(self, folder: Path, resume: bool, overwrite: bool, verify: bool = True):
        self.folder, self.resume, self.overwrite, self.verify = folder, resume, overwrite, verify
        self.checkpoints, self.final = folder / CHECKPOINTS, folder / FINAL
        self.mark: dict[str, Any] | None = None

    # Looking; nothing is changed.

    def look(self) -> None:
        """Raise unless the run may write here.

        Raises:
            ConfigError: `output_dir` is a file.
            FileExistsError: something of others, or of an earlier run, stands in the way; names it.
            DamagedFile: the mark is not as it was written.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ConfigError(f"output_dir: {self.folder} is a file, not a folder")
        self.mark = self._read_mark()
        if self.mark is None:
            self._look_where_no_run_was()
            return
        for name in (CHECKPOINTS, FINAL, START):
            self._check_folder(self.folder / name)
        for name in (LOG, TIMING, CURVE, USAGE):
            check_plain(self.folder / name)
        for stranger in strangers_in(self.checkpoints):
            raise FileExistsError(
                f"{stranger} has the name of a checkpoint and is none of ours: move it away"
            )
        if not self.resume and not self.overwrite:
            self._refuse_earlier_run()

    def _read_mark(self) -> dict[str, Any] | None:
        if not os.path.lexists(self.folder / MARK):
            return None
        mark = read_json(self.folder / MARK, verify=self.verify)
        files = mark.get("files")
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise DamagedFile(f"{self.folder / MARK}: files: expected a mapping of names to checksums")
        return mark

    def _look_where_no_run_was(self) -> None:
        names = (CHECKPOINTS, FINAL, START, LOG, TIMING, CURVE, USAGE)
        present = [name for name in names if os.path.lexists(self.folder / name)]
        if not present:
            return
        earlier = not strangers_in(self.checkpoints) and checkpoints_in(self.checkpoints)
        if self.resume and not self.verify and earlier and not {FINAL, CURVE, USAGE} & set(present):
            return  # a run of an earlier version, which is taken over
        told = (
            "it is of an earlier version of memlayers: go on with --resume --no-verify after moving final/ and the "
            "pictures away, or choose another output_dir"
            if earlier
            else "move it away, or choose another output_dir"
        )
        raise FileExistsError(
            f"{self.folder / present[0]} was not made by this memlayers train ({MARK} is missing), and is not touched; "
            f"{told}"
        )

    def _check_folder(self, path: Path) -> None:
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise FileExistsError(f"{path} is a link or no folder of ours; it is not touched: move it away")
        if path == self.checkpoints and path.is_dir() and not os.path.lexists(path / MARK):
            raise FileExistsError(f"{path} was not made by memlayers train; it is not touched: move it away")

    def _refuse_earlier_run(self) -> None:
        told = "Go on with --resume, start anew with overwrite=true, or choose another output_dir."
        if present := [*checkpoints_in(self.checkpoints), *set_aside_in(self.checkpoints)]:
            raise FileExistsError(f"{self.checkpoints} already has {len(present)} checkpoints. {told}")
        if self._is_finished():
            raise FileExistsError(
                f"{self.final} already has a trained model. Start anew with overwrite=true, which replaces it when "
                "the new one is ready, or choose another output_dir."
            )

    def _is_finished(self) -> bool:
        return any(
            name.startswith(f"{FINAL}/") and (self.folder / name).exists() for name in self.mark["files"]
        )

    # Writing; the context of `hold` is around all of it.

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other runs out.

        Raises:
            FolderInUse: another run is writing here; says who.
            As `look`, and OSError that names the folder where it cannot be made.
        """
        make_folder(self.folder)
        with holding_file(self.folder / LOCK):
            settle(self.folder)
            self.look()
            if self.mark is not None:
                kept = f"{START}/" if self.resume else "?"  # what is not going to be replaced
                check_ours(
                    self.folder, [n for n in self.mark["files"] if not n.startswith(kept)], self.mark["files"]
                )
            yield

    def find_checkpoint(self, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to go on from; damaged ones that are newer are set aside. None: there never was one.

        Raises:
            DamagedFile: none is whole; names a file.
            EarlierFormat: it has no checksums.
            FileExistsError: there is a trained model and nothing to go on from.
        """
        found, damaged = newest_whole(self.checkpoints, self.verify)
        if found is None and damaged:
            raise DamagedFile(
                f"no checkpoint in {self.checkpoints} is whole ({damaged[0][1]}); put back a copy that is, or start "
                "anew with overwrite=true"
            )
        if found is None and (aside := set_aside_in(self.checkpoints)):
            raise DamagedFile(
                f"no whole checkpoint in {self.checkpoints}: {aside[0]} was set aside as damaged; put back a copy "
                "that is whole, or start anew with overwrite=true"
            )
        if found is None and self.mark is not None and self._is_finished() and not self.overwrite:
            raise FileExistsError(
                f"{self.final} has a trained model, but there is no checkpoint in {self.checkpoints} to go on from; "
                "start anew with overwrite=true, or choose another output_dir"
            )
        for checkpoint, error in damaged:
            say(f"{error}: {checkpoint} is set aside as {set_aside(checkpoint).name}")
        return found

    def begin(self, resumed: bool, config: dict[str, Any], start: Callable[[Path], None] | None) -> None:
        """Put the marks, and remove the checkpoints of an earlier run where this one starts anew.

        Args:
            resumed: whether a checkpoint was found.
            config: the run's, as plain values.
            start: writes the base of a model with random weights into a folder; None: there is none.

        Raises:
            FileExistsError: a file that would be replaced is not ours; names it.
        """
        if not resumed:
            check_log(self.folder / LOG)
            check_log(self.folder / TIMING)
        if resumed and self.mark is not None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        files = self.mark["files"] if self.mark is not None else {}
        self.mark = {"made_by": "memlayers train", "version": __version__, "created": now, "config": config}
        self.mark["files"] = files

        def fill(folder: Path) -> None:
            if start is not None and not resumed:
                start(folder / START)
            write_json(folder / CHECKPOINTS / MARK, {"made_by": "memlayers train"})

        self.put(fill, replaces=START)
        if not resumed:
            clean(self.checkpoints)
            for old in [*checkpoints_in(self.checkpoints), *set_aside_in(self.checkpoints)]:
                remove(old)

    def put(self, fill: Callable[[Path], None], replaces: str) -> None:
        """Have files here, all of them in one step, in place of those of an earlier run.

        Args:
            fill: writes them into the folder that it is given.
            replaces: a folder of which nothing of ours stays that is not written again.

        Raises:
            FileExistsError: a file that would be replaced is not as we wrote it; names it.
            OSError: the disk is full, say; all is as it was.
        """
        old = self.mark["files"]
        with together(self.folder) as change:
            fill(change.new)
            new = {n: checksum for n, checksum in change.checksums().items() if Path(n).name != MARK}
            change.remove = [n for n in old if n.startswith(f"{replaces}/") and n not in new]
            check_ours(self.folder, [*new, *change.remove], old)
            files = {n: checksum for n, checksum in old.items() if n not in change.remove} | new
            mark = {**self.mark, "files": files}
            write_json(change.new / MARK, mark)
        self.mark = mark
