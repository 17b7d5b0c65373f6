"""The pictures of a report, in one style: lines with bands, bars with intervals, heatmaps; each as the bytes of a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from memlayers.eval.experiment import Bars, Experiment, Heatmap, Lines, Picture

COLUMNS = 3
"""Panels beside each other."""


def draw(experiment: Experiment, view: Picture, cells: Sequence[dict], title: str) -> bytes:
    """A picture of `cells`, see `report.cells_of`; a cell that was not run is left empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = view.metrics[0]
    cells = [cell for cell in cells if cell["metric"] == metric]
    names = list(dict.fromkeys(_name(cell, view.panels) for cell in cells)) or [""]
    columns = 2 if isinstance(view, Heatmap) and len(names) % 2 == 0 else min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=_size(view, cells, rows, columns), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=not isinstance(view, Lines)).flat
    for axis, name in zip(axes, names):
        part = [cell for cell in cells if _name(cell, view.panels) == name]
        {Lines: _lines, Bars: _bars, Heatmap: _heatmap}[type(view)](axis, view, part, cells)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(view.x, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in list(figure.axes)[len(names) :]:
        axis.set_visible(False)
    figure.axes[0].set_ylabel(view.y if isinstance(view, Heatmap) else metric, fontsize=9)
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _size(view: Picture, cells: Sequence[dict], rows: int, columns: int) -> tuple[float, float]:
    if isinstance(view, Heatmap):
        across, down = (len({cell[key] for cell in cells}) for key in (view.x, view.y))
        return columns * (1.3 + 0.85 * max(2, across)), rows * (1.2 + 0.55 * max(2, down))
    return 1.6 + 3.8 * columns, 3.3 * rows


def _name(cell: dict, keys: Sequence[str]) -> str:
    return ", ".join(str(cell[key]) for key in keys)


def _hue(view: Picture, cell: dict) -> str:
    keys = [key for key in ("run", getattr(view, "hue", None)) if key and key in cell]
    return ", ".join(str(cell[key]) for key in keys)


def _styles(view: Picture, cells: Sequence[dict]) -> dict[str, dict[str, Any]]:
    hues = dict.fromkeys(_hue(view, cell) for cell in cells)
    return {hue: {"color": f"C{number % 10}"} for number, hue in enumerate(hues)}


def _measured(view: Picture, cells: Sequence[dict], hue: str) -> list[dict]:
    return [cell for cell in cells if _hue(view, cell) == hue and "not_run" not in cell]


def _bounds(cell: dict) -> tuple[float, float]:
    low, high = cell["low"], cell["high"]
    return (cell["value"],) * 2 if low is None else (min(low, cell["value"]), max(high, cell["value"]))


def _lines(axis, view: Lines, cells: Sequence[dict], everything: Sequence[dict]) -> None:
    for hue, style in _styles(view, everything).items():
        shown = _measured(view, cells, hue)
        at = [cell[view.x] for cell in shown]
        axis.plot(at, [cell["value"] for cell in shown], "o-", markersize=3, label=hue, **style)
        lows, highs = zip(*map(_bounds, shown)) if shown else ((), ())
        axis.fill_between(at, lows, highs, alpha=0.2, linewidth=0, **style)
    places = sorted({cell[view.x] for cell in cells})
    if view.log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
    elif len(places) > 2 and places[0] > 0 and places[-1] > 6 * places[0]:
        axis.set_xscale("log", base=2)
    if len(places) <= 12:
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()


def _bars(axis, view: Bars, cells: Sequence[dict], everything: Sequence[dict]) -> None:
    styles = _styles(view, everything)
    places = list(dict.fromkeys(cell[view.x] for cell in cells))
    width = 0.8 / max(1, len(styles))
    for number, (hue, style) in enumerate(styles.items()):
        shown = _measured(view, cells, hue)
        at = [places.index(cell[view.x]) + (number - (len(styles) - 1) / 2) * width for cell in shown]
        values = [cell["value"] for cell in shown]
        spread = [
            [v - _bounds(c)[0] for v, c in zip(values, shown)],
            [_bounds(c)[1] - v for v, c in zip(values, shown)],
        ]
        axis.bar(at, values, width, yerr=spread if shown else None, capsize=2, label=hue or None, **style)
    axis.set_xticks(range(len(places)), places, rotation=40, ha="right")


def _heatmap(axis, view: Heatmap, cells: Sequence[dict], everything: Sequence[dict]) -> None:
    across, down = (sorted({cell[key] for cell in everything}) for key in (view.x, view.y))
    grid = {(cell[view.x], cell[view.y]): cell for cell in cells if "not_run" not in cell}
    values = [[grid[x, y]["value"] if (x, y) in grid else float("nan") for x in across] for y in down]
    axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, y), (column, x) in ((a, b) for a in enumerate(down) for b in enumerate(across)):
        cell = grid.get((x, y))
        text = "not run" if cell is None else f"{cell['value']:.2f}\nn={cell['n']}"
        colour = "white" if cell is not None and cell["value"] < 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(across)), across)
    axis.set_yticks(range(len(down)), down)
