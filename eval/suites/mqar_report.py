"""What a suite of associative recall measured, for a person: tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from memlayers.eval.config import ARMS, CONTROLS, REGIMES

GUESS = "1 / pairs"


def flat(part: dict) -> Iterator[tuple[str, str, dict]]:
    """(length, number of pairs, cells) of one regime, by number of pairs."""
    cells = [
        (length, n_pairs, cell) for length, by_pairs in part.items() for n_pairs, cell in by_pairs.items()
    ]
    yield from sorted(cells, key=lambda each: (int(each[1]), int(each[0])))


def markdown(name: str, suite: dict, config: dict) -> list[str]:
    """Lines of report.md: for each regime a table of the arms, of the controls and of the gain, and what was not run."""
    lines = []
    for regime, part in suite["results"].items():
        arms = [arm for arm in ARMS if arm in config["arms"]]
        controls = [control for control in CONTROLS if control in config["controls"]]
        lines += [
            "",
            f"## {name}, regime {regime}: {REGIMES[regime]}",
            "",
            "Share of queries whose value is the most likely token behind their key. A guess among all values is right "
            f"at {suite['chance']:.4f}, one among those of the row at 1 / pairs. Wilson 95 % intervals for as many "
            "items as there are rows.",
            "",
            *_table(part, arms),
        ]
        if controls:
            lines += ["", "Controls:", "", *_table(suite["controls"][regime], controls)]
        lines += _gain_table(suite["gain"].get(regime, {}))
        lines += _reasons(part, suite["controls"].get(regime, {}))
    return lines


def _table(part: dict, names: list[str]) -> list[str]:
    lines = ["| pairs | tokens | queries | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 3)]
    for length, n_pairs, cells in flat(part):
        counts = {f"{cell['n']} in {cell['rows']} rows" for cell in cells.values() if "n" in cell}
        row = [n_pairs, length, *(counts or {"–"}), *(_cell(cells[name]) for name in names)]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _cell(cell: dict) -> str:
    if "not_run" in cell:
        return "not run"
    return f"{cell['accuracy']:.3f} [{cell['ci_low']:.3f}, {cell['ci_high']:.3f}]"


def _gain_table(part: dict) -> list[str]:
    if not part:
        return []
    lines = ["", "Memory gain, trained − base_cut (bootstrap over rows):", ""]
    lines += ["| pairs | tokens | gain | 95 % interval |", "|---|---|---|---|"]
    for length, n_pairs, cell in flat(part):
        low, high = cell["ci_low"], cell["ci_high"]
        bounds = "one row" if low is None else f"[{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {n_pairs} | {length} | {cell['gain']:+.3f} | {bounds} |")
    return lines


def _reasons(*parts: dict) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for part in parts:
        for length, n_pairs, cells in flat(part):
            for name, cell in cells.items():
                if "not_run" in cell:
                    reasons.setdefault(cell["not_run"], []).append(f"{name} at {n_pairs} in {length}")
    return [
        line
        for reason, where in reasons.items()
        for line in ("", f"Not run: {', '.join(where)}: {reason.rstrip('.')}.")
    ]


def picture(name: str, suite: dict, path: str | Path) -> None:
    """A PNG picture: accuracy over the number of pairs, a line an arm with its intervals; a panel a regime and length
    (one for all lengths where each number of pairs has its own)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(suite["results"])
    n_columns = max(map(len, panels))
    figure = Figure(figsize=(1.5 + 3.8 * n_columns, 3.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), n_columns, squeeze=False)
    for row, line in zip(axes, panels):
        for axis, (title, cells) in zip(row, line):
            _draw(axis, cells)
            axis.set_title(title, fontsize=9)
    labels = [axis.get_legend_handles_labels() for row in axes for axis in row]
    lines = {label: handle for handles, names in labels for handle, label in zip(handles, names)}
    order = [label for label in (*ARMS, GUESS) if label in lines]
    figure.legend([lines[label] for label in order], order, loc="outside right center", fontsize=8)
    figure.suptitle(f"{name}: associative recall", fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def _panels(results: dict) -> list[list[tuple[str, dict[int, dict]]]]:
    """Rows of panels, each (title, number of pairs -> cells): a row a regime, or all regimes in one."""
    panels = []
    for regime, part in results.items():
        by_pairs = {int(n_pairs): cells for _, n_pairs, cells in flat(part)}
        if len(by_pairs) == len(list(flat(part))):
            lines = [(f"regime {regime}", by_pairs)]
        else:
            lines = [
                (f"regime {regime}, {length} tokens", {int(n): cells for n, cells in by_pairs.items()})
                for length, by_pairs in part.items()
            ]
        panels.append(lines)
    return [[line for (line,) in panels]] if all(len(lines) == 1 for lines in panels) else panels


def _draw(axis, cells: dict[int, dict]) -> None:
    counts = list(cells)
    for arm in next(iter(cells.values())):
        shown = [(n, row[arm]) for n, row in cells.items() if "accuracy" in row[arm]]
        values = [cell["accuracy"] for _, cell in shown]
        spread = [[max(0.0, c["accuracy"] - c["ci_low"]) for _, c in shown]]
        spread += [[max(0.0, c["ci_high"] - c["accuracy"]) for _, c in shown]]
        if shown:
            at = [n for n, _ in shown]
            look = {"color": f"C{ARMS.index(arm)}", "linestyle": "-" if arm == "trained" else "--"}
            axis.errorbar(at, values, yerr=spread, label=arm, marker="o", markersize=3, capsize=2, **look)
    axis.plot(counts, [1 / n for n in counts], "k:", linewidth=0.8, label=GUESS)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, counts)
    axis.minorticks_off()
    axis.set_ylim(-0.02, 1.03)
    axis.set_xlabel("pairs")
    axis.set_ylabel("share of queries right")
