"""`memlayers eval`: one experiment from one config file; `memlayers report` and `memlayers compare`: its runs together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, quiet


@command
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="The config file (or --config), and fields to set over it: model=runs/mine/final suites.passkey.n=100.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="YAML file of the experiment; see configs/eval.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the report; default: runs/eval/NAME-OF-CONFIG."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run an experiment: what a model remembers, with arms, controls and intervals.

    The config names it (`experiment: recall`): recall (passkeys, needles, fact updates), facts, pairs, perplexity on the
    models of a checkpoint; bits, capacity, bank, procedures, cartridge, reversible and finetuned on a base.

    recall asks the trained model beside its base, the base truncated to the same window, the model with its memory
    disabled, and the same memory untrained, all on the same items. Controls: no needle in the text, the state of another
    item, a zeroed state, the question alone. Conditions: full_context, all of the text in attention; sliding_window,
    attention limited to the window; memory_only, the text is written to memory, the cache dropped, and the question asked
    of the memory state. A cell that cannot be measured is reported as not run, with the reason.

    OUT gets records.jsonl, report.md, report.html, report.json and pictures. Interrupted, the same command goes on with
    the seeds that are left; a folder with records of another config is refused.
    """
    quiet()
    from memlayers.eval.runner import evaluate as run
    from memlayers.eval.runner import load_config

    overrides = list(arguments or [])
    if config is None:
        if not overrides or "=" in overrides[0]:
            raise typer.BadParameter("give a config file, such as configs/eval/passkey.yaml")
        config = Path(overrides.pop(0))
    checked = load_config(config, overrides)
    out = out or Path("runs/eval") / config.stem
    show(run(checked, out))
    _say(f"wrote {out / 'report.html'} and what lies beside it")


@command
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders of `memlayers eval`, or NAME=FOLDERS, such as 'mine=runs/a/seed*/eval'.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write the report to; default: print it.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Put several runs of one experiment into one report: over seeds, and run beside run.

    Runs of the same name count as seeds. They may differ in the model that was measured and in nothing else.
    """
    quiet()
    from memlayers.eval.output import write_output
    from memlayers.eval.runs import report_runs

    results = report_runs(runs)
    show(results)
    if out is not None:
        write_output(out, results.texts, results.pictures, results.report)
        _say(f"wrote {out / 'report.html'} and what lies beside it")


@command
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Folder of `memlayers eval`.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Folder of another run on the same items.")],
    debug: Debug = False,
) -> None:
    """What run A has more than run B on the same items.

    A line an arm and cell: the difference with its interval over units, such as haystacks, and an exact McNemar test with
    Holm's adjustment. Both runs must be of one config, but for the model.
    """
    quiet()
    from rich.console import Console

    from memlayers.eval.runs import compare as compare_runs

    Console().print(grid(*compare_runs(first, second)))


def show(results) -> None:
    """Prints the tables of a report, and its warnings."""
    from rich.console import Console

    console = Console()
    for section in results.sections:
        if section.frame is not None:
            console.print(grid(section.title, section.frame))
    for warning in results.report["warnings"]:
        console.print(f"[bold yellow]Warning.[/] {warning}")


def grid(title: str, frame):
    """A rich table of a DataFrame of text; intervals stand under their values."""
    from rich.table import Table

    table = Table(title=title, title_style="bold", caption="95 % intervals in brackets")
    for name in frame.columns:
        table.add_column(str(name).replace("_", "\n"), justify="right", vertical="top")
    for row in frame.itertuples(index=False):
        table.add_row(*(str(value).replace(" [", "\n[").replace(" (", "\n(") for value in row))
    return table


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(text, soft_wrap=True)
