"""Runs in processes of their own, alone or two together, that are killed and go on, and a look at what each kill has left."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memlayers.files import check_ours, read_json, settle
from memlayers.train.checkpoints import checkpoints_in
from memlayers.train.output import MARK
from memlayers.train.resume import check_whole
from memlayers.train.run import train
from tests.train.remains import assert_equal

CHANGES_OF_DISK = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def kill_and_resume(
    make: Callable[[Path], object], folder: Path, kills: int, seed: int, world: int = 1
) -> dict[str, int]:
    """Train to the end again and again, with kills between; each finished run must be the one that was never killed.

    Half of the kills come at a random time, half at a random call that changes the disk; of two processes both are killed,
    or one alone.

    Args:
        make: the config of a run that writes to a folder.

    Returns:
        Numbers of kills, of finished runs that were compared, and of kills that left a checkpoint half-written.
    """
    rng, found = random.Random(seed), {"killed": 0, "finished": 0, "half-written": 0}
    straight, out = make(folder / "straight"), folder / "killed-0"
    start = time.perf_counter()
    assert run_ranks(straight, world) == [0] * world
    lasts = time.perf_counter() - start
    while found["killed"] < kills:
        by_call = rng.random() < 0.5
        moment = {"at_call": rng.randrange(400)} if by_call else {"after": rng.uniform(0, lasts)}
        victims = list(range(world)) if rng.random() < 0.5 else [rng.randrange(world)]
        statuses = run_ranks(make(out), world, victims, **moment)
        found["half-written"] += any((out / "checkpoints").glob(".tmp-*"))
        check_what_is_left(out)
        if statuses == [0] * world:
            assert_equal(folder / "straight", out)
            found["finished"] += 1
            out = folder / f"killed-{found['finished']}"
        else:
            assert -signal.SIGKILL in statuses, statuses
            found["killed"] += 1
    assert run_ranks(make(out), world) == [0] * world
    assert_equal(folder / "straight", out)
    found["finished"] += 1
    return found


def check_what_is_left(out: Path) -> None:
    """All checkpoints are whole; the trained model is there with all its files, or not at all."""
    for checkpoint in checkpoints_in(out / "checkpoints"):
        check_whole(checkpoint)
    if out.is_dir():
        settle(out)
    final = [path for path in (out / "final").rglob("*") if path.is_file()]
    if final:
        files = read_json(out / MARK)["files"]
        assert {str(path.relative_to(out)) for path in final} == {n for n in files if n.startswith("final/")}
        check_ours(out, files, files)


def run_ranks(
    run,
    world: int = 1,
    victims: list[int] = (),
    after: float | None = None,
    at_call: int | None = None,
    before: Callable[[int], None] | None = None,
) -> list[int]:
    """The statuses of fresh processes that train `run` together and go on where there is a checkpoint.

    before: a function at the top of a module, called in each process with its number.
    """
    fork = multiprocessing.get_context(
        "forkserver"
    )  # a process that has trained may not be forked: it has threads
    fork.set_forkserver_preload(["memlayers.train.run"])
    port = _free_port()
    children = [
        fork.Process(
            target=_life, args=(run, rank, world, port, at_call if rank in victims else None, before)
        )
        for rank in range(world)
    ]
    for child in children:
        child.start()
    if after is not None:
        time.sleep(after)
        for rank in victims:
            children[rank].kill()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _life(run, rank: int, world: int, port: int, at_call: int | None, before) -> None:
    said = os.open(f"{run.output_dir}-rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
    if at_call is not None:
        _kill_at_call(at_call)
    if before is not None:
        before(rank)
    torch.set_num_threads(1)
    train(run, resume=True)


def _kill_at_call(n: int) -> None:
    """Have this process killed just before or just after its `n`-th call that changes the disk."""
    calls, lock = iter(range(10**9)), threading.Lock()

    def counted(function):
        def call(*args, **kwargs):
            with lock:
                last = next(calls) >= n
            if last and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CHANGES_OF_DISK:
        setattr(os, name, counted(getattr(os, name)))
