"""Several processes of one run: where one fails all of them stop, and none waits for the others for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
PLAIN = (str, int, Path)
"""What the main process can tell the others."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to do."""


class OtherProcessFailed(TrainingError):
    """Another process of this run had an error; the message says which process and what error."""


def all_or_none(accelerator: Accelerator, action: Callable[[], T] | None) -> T | None:
    """Run `action` on every process; every process must call this, and `action` must not wait for another process;
    None: nothing is to be done on this one.

    Returns:
        What this process's `action` returns.

    Raises:
        OtherProcessFailed: `action` raised on another process and not on this one.
    """
    return _run(accelerator, action)[0]


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """As `all_or_none`, but the main process alone runs `action`.

    Returns:
        What it returned there, on every process: plain values or a path.
    """
    return _run(accelerator, action if accelerator.is_main_process else None)[1]


def _run(accelerator: Accelerator, action: Callable[[], Any] | None) -> tuple[Any, Any]:
    """What `action` returned here, and what it returned on the main process."""
    result, error = None, None
    try:
        result = action() if action else None
    except Exception as failure:
        error = failure
    told = None if error is None else f"{type(error).__name__}: {error}"
    sent = result if accelerator.is_main_process and isinstance(result, PLAIN) else None
    answers = gather_object([(told, sent)]) if accelerator.num_processes > 1 else [(told, result)]
    if error is not None:
        raise error
    for rank, (told, _) in enumerate(answers):
        if told is not None:
            raise OtherProcessFailed(f"process {rank} of this run failed: {told}")
    return result, answers[0][1]


def let_go(objective: nn.Module) -> None:
    """Take from what DDP wraps all that holds the process group; it is not used after.

    Else the group dies with DDP's reducer. That one does not let go of Python while it waits for the threads of the
    group, and these wait for Python: the process would never end.
    """
    if isinstance(objective, DistributedDataParallel):
        objective.reducer = objective.logger = None
