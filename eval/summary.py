"""Several seeds of several trainings in one table.

    python -m memlayers.eval.summary --out eval/results/stories260k.md \
        "memory, base trained@D=runs/stories260k_passkey/seed*/eval" \
        "full attention@F=runs/stories260k_full_attention/seed*/eval"

Each argument is a name, the regime to show, and a glob of folders with a report.json, one folder a seed. The first
one's controls and base arms are shown too. A suite of facts has regime P:

    python -m memlayers.eval.summary --suite facts "memory@P=runs/facts_memory/seed*/eval" \
        "LoRA@P=runs/facts_lora/seed*/eval" "full finetuning@P=runs/facts_full/seed*/eval"

A suite of associative recall has its numbers of pairs in columns (--suite mqar). Where the folder of the training stands
around its eval folder (log.jsonl is there), the steps it took are shown too.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from memlayers.eval.output import read_report
from memlayers.eval.suites.facts_report import TITLES, cells_of
from memlayers.eval.suites.mqar_report import flat
from memlayers.files import write_text

NOT_ASKED = "–"
"""In a cell that an evaluation left out."""


@dataclass(frozen=True)
class Group:
    """One training: its name, the regime to show, a report a seed, and the steps each seed learned (or [])."""

    name: str
    regime: str
    reports: list[dict]
    steps: list[int]


def load_group(argument: str) -> Group:
    """The group `NAME@REGIME=GLOB` names.

    Raises `ValueError` for an argument of another form, `FileNotFoundError` where a report is missing.
    """
    parts = re.fullmatch(r"(.+)@([FWDP])=(.+)", argument)
    if parts is None:
        raise ValueError(f"{argument!r}: give NAME@REGIME=GLOB, such as 'memory@D=runs/a/seed*/eval'")
    name, regime, pattern = parts.groups()
    paths = sorted(Path(folder) / "report.json" for folder in glob.glob(pattern))
    if not paths or not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"{name}: no report.json in {pattern!r}")
    reports = [read_report(path) for path in paths]
    logs = [path.parent.parent / "log.jsonl" for path in paths]
    steps = [steps_of(log) for log in logs] if all(log.is_file() for log in logs) else []
    return Group(name, regime, reports, steps)


def steps_of(log: Path) -> int:
    """The last step in a training's log."""
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"]


def reports_of_seeds(folder: Path) -> list[dict]:
    """The report.json in every `seed*` of a folder, by name.

    Raises `ValueError` where two of them were measured with different configs.
    """
    paths = sorted(folder.glob("seed*/report.json"))
    reports = [read_report(path) for path in paths]
    configs = [{k: v for k, v in each["config"].items() if k not in ("seed", "seeds")} for each in reports]
    for path, config in zip(paths, configs):
        if config != configs[0]:
            raise ValueError(
                f"{path}: config differs from that of {paths[0]}; give another folder with --out"
            )
    return reports


def seeds_of(reports: Iterable[dict]) -> str:
    """The seeds of reports, as `0, 1, 2`."""
    return ", ".join(str(report["config"]["seed"]) for report in reports)


def versions_of(report: dict) -> str:
    """The versions that a report ran with, as `python 3.12.0, torch 2.13.0`."""
    return ", ".join(f"{name} {value}" for name, value in report["versions"].items())


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


def summary(groups: list[Group], suite: str) -> str:
    """Markdown: one table of recall, lengths in columns, and one of perplexities where they were measured.

    Raises `ValueError` where a report has no such suite.
    """
    first = groups[0]
    for group in groups:
        for there in (report["config"]["suites"] for report in group.reports):
            if suite not in there:
                raise ValueError(f"--suite: {group.name} has no suite {suite!r}, but {', '.join(there)}")
    if suite in first.reports[0].get("facts", {}):
        return facts_summary(groups, suite)
    if suite in first.reports[0].get("mqar", {}):
        return mqar_summary(groups, suite)
    report, seeds = first.reports[0], ", ".join(f"{group.name}: {len(group.reports)}" for group in groups)
    original = replace(first, reports=[report])
    lines = [(group, group.name, "results", "trained") for group in groups]
    lines += [(first, f"{first.name}: {arm}", "results", arm) for arm in ("memory_off", "untrained")]
    lines += [(first, f"{first.name}: {c}", "controls", c) for c in report["config"]["controls"]]
    lines += [(original, f"original checkpoint: {arm}", "results", arm) for arm in ("base", "base_cut")]
    asked = {length for g in groups for length in g.reports[0]["results"][suite][g.regime]}
    lengths = sorted(asked, key=int)
    rows = [_row(group, title, part, suite, arm, lengths) for group, title, part, arm in lines]
    rows = [row for row in rows if set(row[2:]) != {NOT_ASKED}]
    lines = [
        f"# {suite}, window {report['config']['window']} tokens",
        "",
        f"Exact match over {report['config']['suites'][suite]['n']} items a cell: mean over seeds (lowest to highest "
        f"seed). Seeds: {seeds}.",
        "",
        *table(["", "regime", *(f"{length} tokens" for length in lengths)], rows),
    ]
    lines += steps_summary(groups)
    if "perplexity" in report:
        rows = [
            [f"original checkpoint: {arm}", over_seeds([report["perplexity"][arm]], "perplexity", 2)]
            for arm in ("base", "base_cut")
        ]
        for group in groups:
            for arm in ("trained", "memory_off"):
                cells = [each["perplexity"][arm] for each in group.reports]
                rows.append([f"{group.name}: {arm}", over_seeds(cells, "perplexity", 2)])
        lines += ["", "## Perplexity on unseen prose", "", *table(["", "perplexity"], rows)]
    return "\n".join(lines) + "\n"


def steps_summary(groups: list[Group]) -> list[str]:
    """Markdown: how long each training took until it stopped by itself, or to its last step."""
    rows = [
        [group.name, over_seeds([{"steps": n} for n in group.steps], "steps", 0)]
        for group in groups
        if group.steps
    ]
    return ["", "## Steps of training", "", *table(["", "steps"], rows)] if rows else []


def _row(group: Group, title: str, part: str, suite: str, arm: str, lengths: list[str]) -> list[str]:
    measured = [report[part][suite][group.regime] for report in group.reports]
    cells = [
        over_seeds([cells[length][arm] for cells in measured], "accuracy", 3)
        if all(arm in cells.get(length, {}) for cells in measured)
        else NOT_ASKED
        for length in lengths
    ]
    return [title, group.regime, *cells]


def facts_summary(groups: list[Group], suite: str) -> str:
    """Markdown: one table, trainings and arms down, metrics across."""
    first = groups[0]
    report, seeds = first.reports[0], ", ".join(f"{group.name}: {len(group.reports)}" for group in groups)
    lines = [(group.name, group, "trained") for group in groups]
    lines += [(f"{first.name}: {arm}", first, arm) for arm in ("memory_off", "untrained")]
    lines += [("original checkpoint", first, "base")]
    measured = [(title, [_facts_cells(r, suite, arm) for r in group.reports]) for title, group, arm in lines]
    columns = list(dict.fromkeys(column for _, per_seed in measured for column in per_seed[0]))
    rows = [
        [title, *(over_seeds([cells.get(c, NONE) for cells in per_seed], *_shown_as(c)) for c in columns)]
        for title, per_seed in measured
    ]
    facts, chance = report["config"]["suites"][suite]["facts"], report["facts"][suite]["chance"]
    return "\n".join(
        [
            f"# {suite}, regime P: asked without any context",
            "",
            f"{facts['n_facts']} facts, {facts['n_later']} in the later batch. Share right: mean over seeds (lowest to "
            f"highest seed); a guess is right at {chance:.3f}. Seeds: {seeds}.",
            "",
            *table(["", *columns], rows),
            "",
        ]
    )


def mqar_summary(groups: list[Group], suite: str) -> str:
    """Markdown: one table of associative recall, trainings, arms and controls down, numbers of pairs across."""
    first = groups[0]
    report, seeds = first.reports[0], ", ".join(f"{group.name}: {len(group.reports)}" for group in groups)
    lines = [(group.name, group, "results", "trained") for group in groups]
    others = [arm for arm in report["config"]["arms"] if arm != "trained"]
    lines += [(f"{first.name}: {arm}", first, "results", arm) for arm in others]
    lines += [(f"{first.name}: {name}", first, "controls", name) for name in report["config"]["controls"]]
    columns = [
        (length, n_pairs) for length, n_pairs, _ in flat(report["mqar"][suite]["results"][first.regime])
    ]
    rows = []
    for title, group, part, arm in lines:
        per_seed = [each["mqar"][suite][part][group.regime] for each in group.reports]
        cells = [[seed[length][n_pairs][arm] for seed in per_seed] for length, n_pairs in columns]
        rows.append([title, group.regime, *(over_seeds(each, "accuracy", 3) for each in cells)])
    chance = report["mqar"][suite]["chance"]
    return "\n".join(
        [
            f"# {suite}, associative recall over the number of pairs",
            "",
            f"Share of queries right over {report['config']['suites'][suite]['n']} rows a cell: mean over seeds (lowest to "
            f"highest seed). A guess among all values is right at {chance:.4f}, one among those of the row at 1 / pairs. "
            f"Seeds: {seeds}.",
            "",
            *table(
                ["", "regime", *(f"{n_pairs} pairs, {length} tokens" for length, n_pairs in columns)], rows
            ),
            *steps_summary(groups),
            "",
        ]
    )


NONE = {"not_run": "this arm has no such cell"}
PERPLEXITY, ABOVE = "perplexity", "perplexity, % above base"


def _facts_cells(report: dict, suite: str, arm: str) -> dict[str, dict]:
    """Column -> cell of one arm in one report."""
    block = report["facts"][suite]
    cells = {TITLES[metric]: row.get(arm, NONE) for metric, row in cells_of(block).items()}
    if arm == "trained":
        for metric, cell in block.get("forgetting", {}).items():
            cells[f"forgotten, {TITLES[metric]}"] = {"accuracy": cell["forgotten"]}
    if "perplexity" in report:
        own, base = (report["perplexity"].get(name, NONE) for name in (arm, "base"))
        cells[PERPLEXITY] = own
        known = "perplexity" in own and "perplexity" in base
        cells[ABOVE] = {"change": 100 * (own["perplexity"] / base["perplexity"] - 1)} if known else NONE
    return cells


def _shown_as(column: str) -> tuple[str, int]:
    """Field and digits of a column."""
    return {PERPLEXITY: ("perplexity", 2), ABOVE: ("change", 1)}.get(column, ("accuracy", 3))


def main(
    groups: Annotated[list[str], typer.Argument(help="NAME@REGIME=GLOB of folders with a report.json.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write; default: print it.")] = None,
    suite: Annotated[str, typer.Option(help="Name of the suite in the reports.")] = "passkey",
) -> None:
    """Put several seeds of several trainings into one table."""
    text = summary([load_group(group) for group in groups], suite)
    if out is None:
        print(text)
    else:
        write_text(out, text)


if __name__ == "__main__":
    typer.run(main)
