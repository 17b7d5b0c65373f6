"""Several seeds of several trainings in one table.

    python -m memlayers.eval.summary --out eval/results/stories260k.md \
        "memory, base trained=runs/stories260k_passkey/seed*/eval" \
        "memory, base frozen=runs/stories260k_frozen/seed*/eval"

Each argument is a name and a glob of folders with a report.json, one folder a seed.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from memlayers.files import write_text


def load_groups(arguments: Iterable[str]) -> dict[str, list[dict]]:
    """Reports by group name. Raises `ValueError` for an argument without `=`, `FileNotFoundError` for no report."""
    groups = {}
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r}: give NAME=GLOB, such as 'memory=runs/a/seed*/eval'")
        paths = sorted(Path(folder) / "report.json" for folder in glob.glob(pattern))
        if not paths or not all(path.is_file() for path in paths):
            raise FileNotFoundError(f"{name}: no report.json in {pattern!r}")
        groups[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return groups


def over_seeds(cells: Iterable[dict], field: str, digits: int) -> str:
    """`mean (lowest to highest)` of `field`, or why there is none."""
    cells = list(cells)
    missing = [cell["not_run"] for cell in cells if "not_run" in cell]
    if missing or not cells:
        return "not run"
    values = [cell[field] for cell in cells]
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def summary(groups: dict[str, list[dict]], suite: str) -> str:
    """Markdown: one table a regime, with the arms and controls of the first group, and one of perplexities."""
    (main_name, main_reports), first = next(iter(groups.items())), next(iter(groups.values()))[0]
    lines = [
        f"# {suite}, window {first['config']['window']} tokens",
        "",
        f"Exact match over {first['config']['suites'][suite]['n']} items a cell: mean over seeds (lowest to highest "
        "seed). Seeds: " + ", ".join(f"{name}: {len(reports)}" for name, reports in groups.items()) + ".",
    ]
    for regime, cells in first["results"][suite].items():
        rows = [_row(name, reports, "results", suite, regime, "trained") for name, reports in groups.items()]
        for arm in ("memory_off", "untrained"):
            rows.append(_row(f"{main_name}: {arm}", main_reports, "results", suite, regime, arm))
        for control in first["config"]["controls"]:
            rows.append(_row(f"{main_name}: {control}", main_reports, "controls", suite, regime, control))
        for arm in ("base", "base_cut"):
            rows.append(_row(f"original checkpoint: {arm}", [first], "results", suite, regime, arm))
        lines += [
            "",
            f"## Regime {regime}",
            "",
            *table(["", *(f"{length} tokens" for length in cells)], rows),
        ]
    if "perplexity" in first:
        rows = [
            [f"original checkpoint: {arm}", over_seeds([first["perplexity"][arm]], "perplexity", 2)]
            for arm in ("base", "base_cut")
        ]
        for name, reports in groups.items():
            for arm in ("trained", "memory_off"):
                cells = [report["perplexity"][arm] for report in reports]
                rows.append([f"{name}: {arm}", over_seeds(cells, "perplexity", 2)])
        lines += ["", "## Perplexity on unseen prose", "", *table(["", "perplexity"], rows)]
    return "\n".join(lines) + "\n"


def _row(title: str, reports: list[dict], part: str, suite: str, regime: str, arm: str) -> list[str]:
    lengths = reports[0]["results"][suite][regime]
    return [
        title,
        *(
            over_seeds([report[part][suite][regime][length][arm] for report in reports], "accuracy", 3)
            for length in lengths
        ),
    ]


def main(
    groups: Annotated[list[str], typer.Argument(help="NAME=GLOB of folders with a report.json, one a seed.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write; default: print it.")] = None,
    suite: Annotated[str, typer.Option(help="Name of the suite in the reports.")] = "passkey",
) -> None:
    """Put several seeds of several trainings into one table."""
    text = summary(load_groups(groups), suite)
    if out is None:
        print(text)
    else:
        write_text(out, text)


if __name__ == "__main__":
    typer.run(main)
