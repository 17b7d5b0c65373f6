"""SIGKILL at random moments: an operation in a forked child, killed, and a look at what it has left.

`MEMLAYERS_KILLS=200` sets how often; the suite kills a few times only.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

KILLS = int(os.environ.get("MEMLAYERS_KILLS", "6"))


def kill_at_random_moments(
    prepare: Callable[[], None],
    operation: Callable[[], None],
    check: Callable[[], str],
    kills: int = KILLS,
    seed: int = 0,
) -> dict[str, int]:
    """Run `operation` in a child again and again, each time killed at another moment of its course.

    Args:
        prepare: called before each run, in this process.
        operation: what is killed; its first run, which is not, tells how long it takes.
        check: called after each run, in this process; asserts, and says what it found ("old", "new").

    Returns:
        How often `check` found what, and under "killed" how often the child was killed before its end.
    """
    rng, found = random.Random(seed), {"killed": 0}
    prepare()
    start = time.perf_counter()
    assert run_child(operation) == 0, "the operation failed without being killed"
    lasts = time.perf_counter() - start
    check()
    for _ in range(kills):
        prepare()
        killed = run_child(operation, rng.uniform(0, 1.05 * lasts)) == -signal.SIGKILL
        found["killed"] += killed
        told = check()
        found[told] = found.get(told, 0) + 1
    return found


def run_child(operation: Callable[[], None], kill_after: float | None = None) -> int:
    """The status of a forked child that runs `operation`, negative for a signal, as `subprocess` has it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            operation()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under a folder by its name, folders as None; links are not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }
