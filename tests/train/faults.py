"""Faults that are put into a process before it trains."""

from __future__ import annotations

import math
import resource

import torch

from memlayers.train import checkpoints as checkpoints_module
from memlayers.train import run as run_module
from memlayers.train.finite import FiniteCheck


def spoil(learning: dict, name: str, value: float) -> None:
    with torch.no_grad():
        learning[name].view(-1)[5] = value


def nan_at_step_3(rank: int) -> None:
    check = FiniteCheck.check_step

    def spoiled(self, step):
        if step == 3:
            spoil(self.learning, "lm_head.weight", math.nan)
        check(self, step)

    run_module.FiniteCheck.check_step = spoiled


def full_for_process_0(rank: int) -> None:
    _full(rank == 0)


def full_for_process_1(rank: int) -> None:
    _full(rank == 1)


def _full(here: bool) -> None:
    own = run_module.write_own

    def full(folder, usage, rank):
        if here and "-00000004-" in folder.name:
            raise OSError(28, f"cannot write {folder}: No space left on device")
        own(folder, usage, rank)

    run_module.write_own = full


def small_files_from_checkpoint_4(rank: int) -> None:
    begin = checkpoints_module._begin

    def limited(place):
        if place.name.endswith("4"):
            _limit()
        return begin(place)

    checkpoints_module._begin = limited


def small_files_from_final(rank: int) -> None:
    save = run_module.save_model

    def limited(*args):
        _limit()
        save(*args)

    run_module.save_model = limited


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
