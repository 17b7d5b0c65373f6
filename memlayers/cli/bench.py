"""`memlayers bench`: a memory beside what a user would take in its place, both in one run."""

from __future__ import annotations

import importlib
import inspect
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, quiet
from memlayers.eval.speed import BENCHMARKS

Benchmark = StrEnum("Benchmark", BENCHMARKS)


@command
def bench(
    kind: Annotated[Benchmark, typer.Argument(help="Which memory.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every arm runs once in each.")] = 20,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    ttt_lm: Annotated[
        Path | None,
        typer.Option(
            envvar="MEMLAYERS_TTT_LM",
            exists=True,
            dir_okay=False,
            help="For neural: the file ttt.py of github.com/test-time-training/ttt-lm-pytorch, to compare with it.",
        ),
    ] = None,
    armt: Annotated[
        Path | None,
        typer.Option(
            envvar="MEMLAYERS_ARMT",
            exists=True,
            file_okay=False,
            help="For token_memories: a clone of github.com/RodkinIvan/associative-recurrent-memory-transformer, "
            "to compare with it.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    debug: Debug = False,
) -> None:
    """Time a kind of memory beside its peers: p20, p50 and p80 of each, and ratios round by round.

    Peers come from PyPI with `pip install memlayers[bench]`; one that is missing is left out and named.
    On a CPU set OMP_NUM_THREADS for the number of threads.
    """
    quiet()
    import torch
    from rich.console import Console

    from memlayers.files import write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = importlib.import_module(f"memlayers.eval.speed.{kind}").benchmark
    peers, takes = {"ttt_lm": ttt_lm, "armt": armt}, inspect.signature(benchmark).parameters
    report = benchmark(rounds, device, **{name: path for name, path in peers.items() if name in takes})
    console = Console()
    for name, part in report.items():
        if isinstance(part, dict) and "work" in part:
            console.print(table(f"{name}: {part['work']}", part))
    console.print(f"{report['device']}, {report['threads']} threads, {report['versions']}", soft_wrap=True)
    if report["not installed"]:
        console.print(f"not installed, so not compared: {', '.join(report['not installed'])}")
    if output is not None:
        write_text(output, json.dumps(report, indent=2) + "\n")
        console.print(f"written to {output}")


def table(title: str, part: dict):
    """A rich table: milliseconds of every arm, then the ratios; what is one figure stands under p50."""
    from rich.table import Table

    out = Table("", title=title)
    for column in ("p20", "p50", "p80"):
        out.add_column(column, justify="right")
    for section, rows in part.items():
        if not isinstance(rows, dict):
            continue
        rows = {section: rows} if "p50" in rows else rows
        for name, cell in rows.items():
            figures = [f"{cell[p]:.3g}" for p in cell] if isinstance(cell, dict) else ["", f"{cell:.3g}", ""]
            out.add_row(f"{name} ({section})" if name != section else name, *figures)
        out.add_section()
    return out
