"""`memlayers train`: the loop of train/run.py, in this process or in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, packaged, quiet


@command
def train(
    config: Annotated[
        Path,
        typer.Option("--config", "-c", help="YAML file of the run; see configs/train.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Fields to set over the file: optimizer.learning_rate=1e-3 data.regime=W.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in output_dir.")
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="With --resume: take the newest checkpoint without its checksums."),
    ] = False,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU, or gloo on the CPU.")
    ] = 1,
    debug: Debug = False,
) -> None:
    """Train a model with memory, from one YAML file.

    The file says which checkpoint, which memories, what learns (the memory alone, or the base or a LoRA with
    it), on what data, with which loss, curriculum and schedule. Unknown fields are errors.

    OUTPUT_DIR gets final/ (the trained model, for `memlayers.load`), checkpoints/, log.jsonl and curve.png.
    A run that was killed goes on with `--resume` to the same weights, bit for bit, on one process. Nothing in
    OUTPUT_DIR is replaced or removed that a run has not written; a damaged checkpoint is set aside.

    For other machines and launchers: `accelerate launch train/run.py --config FILE`.
    """
    overrides = list(overrides or [])
    if num_processes > 1:
        launch(config, overrides, resume, no_verify, num_processes, debug)
        return
    quiet()
    from memlayers.train.config import TrainConfig
    from memlayers.yaml_config import load_yaml

    checked = load_yaml(config, overrides, TrainConfig)  # before torch.distributed and all that is slow
    from memlayers.train.run import train as run

    run(checked, resume=resume, verify=not no_verify)


def launch(config: Path, overrides: list[str], resume: bool, no_verify: bool, n: int, debug: bool) -> None:
    """Run train/run.py in `n` processes and exit with its status.

    torchrun and not `accelerate launch`, which on a CPU silently starts one process whatever is asked of it.
    """
    import torch

    environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    if torch.cuda.device_count() < n:
        environment["ACCELERATE_USE_CPU"] = "true"
    arguments = ["--config", str(config), *overrides, f"num_processes={n}"]
    arguments += ["--resume"] * resume + ["--no-verify"] * no_verify + ["--debug"] * debug
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    done = subprocess.run([*torchrun, str(packaged("train/run.py")), *arguments], env=environment)
    if done.returncode:
        raise typer.Exit(done.returncode)
