"""`memlayers demo`: the whole way on the embedded tiny base, from wrapping to the table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, packaged, quiet


@command
def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Fields of the training to set over configs/train/demo_passkey.yaml.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything the demo leaves.")] = Path(
        "runs/demo"
    ),
    items: Annotated[
        int | None,
        typer.Option(min=1, help="Questions a length, in place of those in configs/eval/demo.yaml."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train and measure memory on the embedded tiny base: a few minutes on a laptop, no network, no GPU.

    The base, two layers and a tokenizer made by train/tiny_base.py, recalls a 5-digit passkey inside a
    window of 32 tokens. The demo wraps it with memory tokens, trains it with train/run.py and
    configs/train/demo_passkey.yaml, and asks it with configs/eval/demo.yaml for passkeys far outside of
    the window, beside the base and the controls.

    OUT gets records.jsonl, report.json, report.md, report.html, passkey.png and train/ with the trained model.
    """
    quiet()
    from rich.console import Console

    from memlayers.cli.evaluate import show
    from memlayers.eval.output import RECORDS
    from memlayers.eval.runner import evaluate, load_config
    from memlayers.train.config import TrainConfig
    from memlayers.train.run import train
    from memlayers.yaml_config import load_yaml

    console, started = Console(), time.perf_counter()
    if out.is_file():
        raise NotADirectoryError(f"--out {out} is a file; give a folder, or a name that is free")
    base = packaged("demo/base")
    ours = [f"model.path={base}", f"output_dir={out / 'train'}", "overwrite=true"]
    training = load_yaml(
        packaged("configs/train/demo_passkey.yaml"), [*ours, *(overrides or [])], TrainConfig
    )
    asked = [f"model={out / 'train' / 'final'}", f"base={base}"]
    asked += [f"suites.passkey.n={items}"] if items else []
    evaluation = load_config(packaged("configs/eval/demo.yaml"), asked)

    console.rule("train")
    console.print(f"base {base}, memories {list(training.memories)}, at most {training.max_steps:,} steps")
    train(training)
    trained = time.perf_counter()

    console.rule("evaluate")
    (out / RECORDS).unlink(missing_ok=True)  # the model was trained anew
    show(evaluate(evaluation, out))
    done = time.perf_counter()
    console.print(f"trained in {trained - started:.0f} s, evaluated in {done - trained:.0f} s")
    console.print(f"report: {out / 'report.json'}   picture: {out / 'passkey.png'}", soft_wrap=True)
