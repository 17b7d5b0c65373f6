"""From records to the tables of a report, with intervals, and to its warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memlayers.eval.experiment import Experiment, Gains, Picture, Record, Table, View
from memlayers.eval.pages import Section
from memlayers.eval.statistics import above_chance, gain, holm

LEAK = 0.01
"""A control that is right more often than guessing with a smaller p (Holm over all controls) is a warning."""
NOT_RUN = "not run"


def pandas():
    """The module, which tables are made with.

    Raises:
        ImportError: one line that names the extra.
    """
    try:
        import pandas
        import tabulate  # noqa: F401, for DataFrame.to_markdown
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed, reports need it: pip install 'memlayers[eval]'"
        ) from None
    return pandas


def to_frame(records: Sequence[Record], run: str = ""):
    """A DataFrame of records; `cluster` tells units apart, those of two seeds or runs are two."""
    frame = pandas().DataFrame(records, dtype=object)
    frame["cluster"] = [f"{run}:{row['seed']}:{row.get('unit', '')}" for row in records]
    for column in ("not_run", "unit", "item"):
        if column not in frame:
            frame[column] = None
    return frame if not run else frame.assign(run=run)


def select(frame, keys: Sequence[str], where: Mapping[str, Sequence]):
    """The records that a view shows, those of unknown `keys` left out; the keys in order: as in `where`, numbers from the
    smallest, else as they come."""
    for key in {*keys, *where} - {*frame.columns}:
        frame = frame.assign(**{key: None})
    for key, values in where.items():
        frame = frame[frame[key].isin(values)]
    frame = frame[frame[list(keys)].notna().all(axis=1)] if keys else frame
    columns = {}
    for key in keys:
        there = list(dict.fromkeys(frame[key]))
        if key in where:
            there = [value for value in where[key] if value in there]
        elif all(isinstance(value, int | float) for value in there):
            there = sorted(there)
        columns[key] = pandas().Categorical(frame[key], categories=there, ordered=True)
    return frame.assign(**columns)


def groups(frame, keys: Sequence[str]) -> Iterator[tuple[dict, object]]:
    """({key: value}, records) for each combination that is there, in the order of the keys."""
    if not keys:
        yield {}, frame
        return
    for values, part in frame.groupby(list(keys), observed=True, sort=True):
        yield {key: getattr(value, "item", lambda v=value: v)() for key, value in zip(keys, values)}, part


def view_keys(view: View, frame) -> tuple[str, ...]:
    """The keys of a view's cells; several runs are told apart first."""
    run = ("run",) if "run" in frame and frame["run"].nunique() > 1 else ()
    if isinstance(view, Picture):
        others = [getattr(view, name, None) for name in ("hue", "y")]
        return (*view.by, *view.panels, *run, view.x, *filter(None, others))
    cols = getattr(view, "cols", None)
    return (*view.by, *run, *view.rows, *filter(None, [cols]))


def cells_of(experiment: Experiment, frame, view: View, resamples: int) -> list[dict]:
    """A dict for each cell of a table or a picture: its keys, `metric`, and the estimate with `by_seed`; or `not_run`."""
    keys, cells = view_keys(view, frame), []
    shown = select(frame, keys, view.where)
    seeds = sorted(set(shown["seed"]))
    drawn_from = seeds[0] if len(seeds) == 1 else 0
    for name in view.metrics:
        metric = experiment.metric(name)
        if metric.field not in shown:
            continue
        for at, part in groups(shown[shown[metric.field].notna()], keys):
            cell = {**at, "metric": name, **metric.estimate(part, resamples, drawn_from)}
            if len(seeds) > 1:
                each = {seed: metric.estimate(of, 100, 0)["value"] for seed, of in part.groupby("seed")}
                cell["by_seed"] = {str(seed): value for seed, value in each.items()}
            cells.append(cell)
    there = [{key: cell[key] for key in keys} for cell in cells]
    for at, part in groups(shown[shown["not_run"].notna()], keys):
        if at not in there:
            cells.append({**at, "metric": view.metrics[0], "not_run": part["not_run"].iloc[0]})
    return cells


def gains_of(experiment: Experiment, frame, view: Gains, resamples: int) -> list[dict]:
    """A dict for each arm and cell of a table of gains; Holm's adjustment over all of them."""
    metric, key, cells = experiment.metric(view.metrics[0]), experiment.compared, []
    keys = view_keys(view, frame)
    shown = select(frame, keys, view.where)
    shown = shown[shown[metric.field].notna()] if metric.field in shown else shown[:0]
    seeds = sorted(set(shown["seed"]))
    arms = view.of or [a for a in dict.fromkeys(shown[key]) if a not in (view.over, *experiment.controls)]
    for at, part in groups(shown, keys):
        base = part[part[key] == view.over]
        for arm in arms:
            own, other = on_the_same_items(part[part[key] == arm], base, experiment)
            if len(own):
                found = gain(own, other, metric.field, resamples, seeds[0] if len(seeds) == 1 else 0)
                cells.append({**at, key: arm, "over": view.over, "metric": metric.name, **found})
    return with_holm(cells)


def with_holm(cells: list[dict]) -> list[dict]:
    """The cells with `p_holm` beside every `p`."""
    tested = [cell for cell in cells if "p" in cell]
    for cell, p in zip(tested, holm([cell["p"] for cell in tested])):
        cell["p_holm"] = p
    return cells


def on_the_same_items(first, second, experiment: Experiment, compared: bool = True):
    """The records of two arms about the same items, in the same order: two frames of one length.

    compared: the arms differ in the key that the experiment compares; else in the run.
    """
    keys = [k for k in experiment.keys if k in first and not (compared and k == experiment.compared)]
    ident = [*keys, "seed", *(["run"] if compared and "run" in first else []), "unit", "item"]
    index = pandas().MultiIndex.from_frame
    a, b = (part.set_axis(index(part[ident].astype(str))) for part in (first, second))
    if a.index.has_duplicates or b.index.has_duplicates:
        raise ValueError(f"records of one arm name an item twice: {', '.join(ident)} must tell them apart")
    both = a.index.intersection(b.index, sort=False)
    return a.loc[both].reset_index(drop=True), b.loc[both].reset_index(drop=True)


def warnings_of(experiment: Experiment, frame) -> list[str]:
    """What a reader must not overlook: controls that are right more often than by chance, states that grow."""
    told, found = [], []
    share = experiment.metrics[0]
    if experiment.controls and share.field in frame:
        shown = select(
            frame, [k for k in experiment.keys if k in frame], {experiment.compared: experiment.controls}
        )
        keys = [k for k in experiment.keys if k in frame and k != "depth"]
        for at, part in groups(shown[shown[share.field].notna()], keys):
            cell, chance = share.estimate(part, 100, 0), float(part.get("chance", 0 * part["seed"]).max())
            p = above_chance(round(cell["value"] * cell["units"]), cell["units"], chance)
            found.append((at, cell, chance, p))
    for (at, cell, chance, _), p in zip(found, holm([each[-1] for each in found])):
        if p < LEAK and cell["value"] > chance:
            place = ", ".join(f"{key} {value}" for key, value in at.items())
            told.append(
                f"{place}: right at {cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}], where guessing gives "
                f"{chance:.3f}. This control must not know the answer: something other than the memory's state carries it."
            )
    return told + _growing(frame)


def _growing(frame) -> list[str]:
    if "state_bytes" not in frame or "length" not in frame:
        return []
    sized, told = frame[frame["state_bytes"].notna()], []
    for arm, part in sized.groupby("arm"):
        sizes = part.groupby("length")["state_bytes"].max().sort_index()
        if len(sizes) > 1 and sizes.iloc[-1] > 1.2 * sizes.iloc[0]:
            (short, low), (long, high) = (
                (int(n), int(size)) for n, size in (list(sizes.items())[i] for i in (0, -1))
            )
            told.append(
                f"The state of {arm} grows with the text, from {low:,} bytes at {short} tokens to {high:,} at {long}: what it "
                "recalls may be the text itself, kept where attention reaches it."
            )
    return told


def table_of(experiment: Experiment, view: Table, cells: list[dict], several_runs: bool):
    """A DataFrame of text: rows down, columns across, and what was counted."""
    rows, columns = [*(["run"] if several_runs else []), *view.rows], []
    lines: dict[tuple, dict[str, str]] = {}
    for cell in cells:
        at = tuple(cell[key] for key in rows)
        line = lines.setdefault(at, dict(zip(rows, at)))
        column = str(cell[view.cols]) if view.cols else cell["metric"]
        columns += [column] if column not in columns else []
        line[column] = cell_text(cell, experiment.metric(cell["metric"]).digits)
        if "n" in cell:
            n, units = cell["n"], cell["units"]
            count = f"{n:,}" if n == units else f"{n:,} in {units:,} {experiment.unit}s"
            line["n"] = ", ".join(dict.fromkeys([*filter(None, line.get("n", "").split(", ")), count]))
    if view.cols and view.cols in view.where:
        columns = [str(value) for value in view.where[view.cols] if str(value) in columns]
    frame = pandas().DataFrame(lines.values(), columns=[*rows, *columns, "n"])
    return frame.fillna("–")


def cell_text(cell: Mapping, digits: int, sign: str = "") -> str:
    """`0.950 [0.921, 0.972] (0.940 to 0.960)`: value, 95 % interval, lowest to highest seed."""
    if "not_run" in cell:
        return NOT_RUN
    form = f"{sign},.{digits}f"
    text = format(cell["value"], form)
    if cell["low"] is not None and not cell["low"] == cell["high"] == cell["value"]:  # else nothing varies
        text += f" [{cell['low']:{form}}, {cell['high']:{form}}]"
    each = list(cell.get("by_seed", {}).values())
    return text + (f" ({min(each):{form}} to {max(each):{form}})" if len({*each}) > 1 else "")


def gains_table(experiment: Experiment, cells: list[dict], keys: Sequence[str]):
    """A DataFrame of text: an arm a line, what it has more, its interval and p-values."""
    lines = []
    for cell in cells:
        line = {key: cell[key] for key in keys}
        bounds = (
            f"one {experiment.unit}" if cell["low"] is None else f"[{cell['low']:+.3f}, {cell['high']:+.3f}]"
        )
        line |= {"difference": f"{cell['value']:+.3f}", "95 % interval": bounds}
        if "p" in cell:
            line |= {"p": f"{cell['p']:.2g}", "p (Holm)": f"{cell['p_holm']:.2g}"}
        lines.append({**line, "n": f"{cell['n']:,}"})
    return pandas().DataFrame(lines).fillna("")


def by_values(cells: Sequence[dict], keys: Sequence[str]) -> list[tuple[tuple[str, ...], list[dict]]]:
    """(values of the keys, cells that have them), in the order in which they come."""
    parts: dict[tuple[str, ...], list[dict]] = {}
    for cell in cells:
        parts.setdefault(tuple(str(cell[key]) for key in keys), []).append(cell)
    return list(parts.items())


def reasons_of(cells: Sequence[dict], known: Sequence[str]) -> str:
    """Why cells are empty, a sentence a reason. known: keys that the title names."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if "not_run" in cell:
            place = " ".join(str(v) for k, v in cell.items() if k not in ("metric", "not_run", *known))
            reasons.setdefault(cell["not_run"], []).append(place)
    return " ".join(f"Not run: {', '.join(at)}: {why.rstrip('.')}." for why, at in reasons.items())


def sections_of(experiment: Experiment, frame, resamples: int) -> tuple[list[Section], list[dict]]:
    """The tables of a report, and their cells as {title, cells} for report.json."""
    sections, data, several = [], [], "run" in frame and frame["run"].nunique() > 1
    for view in experiment.views:
        if isinstance(view, Picture):
            continue
        compute = gains_of if isinstance(view, Gains) else cells_of
        cells = compute(experiment, frame, view, resamples)
        for at, part in by_values(cells, view.by):
            title = view.title.format(**dict(zip(view.by, at)))
            if isinstance(view, Gains):
                keys = [*(["run"] if several else []), *view.rows, experiment.compared]
                table = gains_table(experiment, part, keys)
            else:
                table = table_of(experiment, view, part, several)
            sections.append(Section(title, f"{view.text} {reasons_of(part, view.by)}".strip(), table))
            data.append({"title": title, "cells": part})
    return sections, data
