"""`memlayers eval`: suites of generated items, asked of all arms and controls; and the tables that show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, quiet


@command
def evaluate(
    config: Annotated[
        Path,
        typer.Option(
            "--config", "-c", help="YAML file of the evaluation; see configs/eval.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Fields to set over the file: model=runs/mine/final suites.passkey.n=100.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the report; default: runs/eval/NAME-OF-CONFIG."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure what a model remembers: passkeys, needles, facts and associative recall, with arms and controls.

    The trained model is asked beside its base, the base cut to the same window, the model with its memory
    off, and the same memory untrained, all on the same items. Controls: no needle in the text, the state of
    another item, a zeroed state, the question alone.

    Regimes: F, all of the text in attention; W, attention limited to the window; D, the text is written to
    memory, the cache dropped, and the question asked of the memory state. A cell that cannot be measured is
    reported as not run, with the reason.

    Facts are asked without any text (regime P): trained and held-out prompts, a later batch, and prompts about
    others, which are to be answered as the base does. Associative recall (mqar) asks for the values of keys, over the
    number of pairs.

    OUT gets report.json, samples.jsonl, report.md and a picture for each suite.
    """
    quiet()
    from rich.console import Console

    from memlayers.eval.config import load_config

    checked = load_config(config, overrides or [])
    from memlayers.eval.run import evaluate as run

    out = out or Path("runs/eval") / config.stem
    report = run(checked, out)
    console = Console()
    for table in tables(report):
        console.print(table)
    console.print(f"wrote {out / 'report.json'} and what lies beside it", soft_wrap=True)


def tables(report: dict):
    """Rich tables of a report: for each suite and regime one of the arms and one of the controls."""
    for suite, block in report.get("facts", {}).items():
        yield grid(f"{suite}, regime P (no context)", {**block["metrics"], **block["controls"]}, "facts")
    for suite, block in report.get("mqar", {}).items():
        for regime in block["results"]:
            for part, told in (("results", ""), ("controls", ": controls")):
                rows = {
                    f"{n_pairs} pairs, {length} tokens": cells
                    for length, by_pairs in block[part][regime].items()
                    for n_pairs, cells in by_pairs.items()
                }
                if any(rows.values()):
                    yield grid(f"{suite}, regime {regime}{told}", rows, "rows")
    window = report["config"]["window"]
    for suite, regimes in report["results"].items():
        for regime, arms in regimes.items():
            title = f"{suite}, regime {regime} (window {window} tokens)"
            yield grid(title, arms)
            controls = report["controls"].get(suite, {}).get(regime, {})
            if any(controls.values()):
                yield grid(f"{title}: controls", controls)


def grid(title: str, lengths: dict[str, dict[str, dict]], counted: str = "n"):
    """One table: lengths (or metrics) down, names across, in each cell the share right and its interval; then n."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in lengths.values() for name in row))
    table = Table(title=title, title_style="bold", caption="share of exact answers, 95 % Wilson interval")
    table.add_column("length" if counted == "n" else "", justify="right")
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="center", no_wrap=True, vertical="top")
    table.add_column(counted, justify="right")
    for length, row in lengths.items():
        counts = sorted({cell[counted] for cell in row.values() if cell.get(counted)})
        table.add_row(length, *(cell_text(row.get(name)) for name in names), ", ".join(map(str, counts)))
    return table


def cell_text(cell: dict | None) -> str:
    """`0.98` over `0.95–0.99`, or a dash where the cell was not measured (report.json has the reason)."""
    if cell is None or cell.get("accuracy") is None:
        return "–"
    return f"{cell['accuracy']:.2f}\n{cell['ci_low']:.2f}–{cell['ci_high']:.2f}"
