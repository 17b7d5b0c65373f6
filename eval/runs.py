"""Several runs together: one report over seeds and runs, and two runs on the same items."""

from __future__ import annotations

import glob
from collections.abc import Sequence

from memlayers.config import ConfigError
from memlayers.eval import registry, report
from memlayers.eval.output import RECORDS, read_records
from memlayers.eval.runner import Results, check_same_config, make_report
from memlayers.eval.statistics import gain

MODELS = (
    "model",
    "base",
    "checkpoint",
    "memories",
    "tokenizer",
    "batch_size",
    "device",
    "dtype",
)
"""Fields that runs in one report may differ in: which models were measured, and on what."""


def load_runs(arguments: Sequence[str]) -> list[tuple[str, dict, list[dict]]]:
    """(name, head, records) of runs given as `FOLDER`, or `NAME=FOLDERS` with a pattern such as `runs/a/seed*/eval`.

    Raises:
        FileNotFoundError: no run is there.
        ConfigError: their configs differ; names the fields.
    """
    runs = []
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        folders = sorted(glob.glob(pattern if equals else argument))
        if not folders:
            raise FileNotFoundError(
                f"{argument}: no run is there; give FOLDER, or NAME=FOLDER with a folder of {RECORDS}"
            )
        for folder in folders:
            runs.append((name if equals else argument, *read_records(folder)))
    first = runs[0]
    for name, head, _ in runs[1:]:
        if head["experiment"] != first[1]["experiment"]:
            raise ConfigError(
                f"{name}: an evaluation of {head['experiment']}, {first[0]} is one of {first[1]['experiment']}"
            )
        check_same_config(first[1], head, name, but=MODELS)
    return runs


def report_runs(arguments: Sequence[str]) -> Results:
    """One report over the seeds of all runs; runs of one name are put together as if they were seeds."""
    runs = load_runs(arguments)
    head, records = {**runs[0][1], "seeds": {}}, []
    for number, (name, each, rows) in enumerate(runs):
        head["seeds"] |= {
            f"{seed} of {name}" if len(runs) > 1 else seed: w for seed, w in each["seeds"].items()
        }
        records += [{**row, "run": name, "seed": row["seed"] + 2**31 * number} for row in rows]
    if len({name for name, _, _ in runs}) == 1:
        records = [{k: v for k, v in row.items() if k != "run"} for row in records]
    names = list(dict.fromkeys(name for name, _, _ in runs))
    return make_report(registry.find(head["experiment"]), head, records, names)


def compare(first: str, second: str) -> tuple[str, object]:
    """Title and table of what run `first` has more than run `second` on the same items, of every arm and cell.

    Raises as `load_runs`; `ConfigError` where the runs share no item.
    """
    (a_name, a_head, a_rows), (b_name, _, b_rows) = load_runs([first, second])
    experiment = registry.find(a_head["experiment"])
    metric, resamples = experiment.metrics[0], a_head["config"]["resamples"]
    frames = [
        report.to_frame([r for r in rows if r.get(metric.field) is not None]) for rows in (a_rows, b_rows)
    ]
    a, b = report.on_the_same_items(*frames, experiment, compared=False)
    if not len(a):
        raise ConfigError(
            f"{a_name} and {b_name} have no item in common: compare runs of the same seeds and tasks"
        )
    answers = [name for name in ("answers", "question") if name in a and name in b]
    if any(a[name].tolist() != b[name].tolist() for name in answers):
        raise ConfigError(
            f"{a_name} and {b_name} asked other questions: compare runs of the same seeds and tasks"
        )
    keys, cells = [key for key in experiment.keys if key in a], []
    ordered = report.select(a, keys, {})
    for at, part in report.groups(ordered, keys):
        cells.append({**at, **gain(part, b.loc[part.index], metric.field, resamples, 0)})
    table = report.gains_table(experiment, report.with_holm(cells), keys)
    return f"{metric.name}: {a_name} less {b_name}, on the same items", table
