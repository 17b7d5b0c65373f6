"""What a facts suite measured, for a person: tables and a picture."""

from __future__ import annotations

from pathlib import Path

TITLES = {
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "later_efficacy": "later batch, efficacy",
    "later_paraphrase": "later batch, paraphrase",
    "locality": "locality",
    "shuffled_facts": "shuffled facts",
}


def cells_of(suite: dict) -> dict[str, dict[str, dict]]:
    """Metrics and the control of a suite's report: name -> arm -> cell."""
    return {**suite["metrics"], **suite["controls"]}


def markdown(name: str, suite: dict) -> list[str]:
    """Lines of report.md: a table metrics × arms, what was not run, and forgetting."""
    cells = cells_of(suite)
    arms = list(suite["metrics"]["efficacy"])
    lines = [
        "",
        f"## {name}, regime P: facts asked without any context",
        "",
        "Greedy answers up to the first full stop, exact. Efficacy: prompts that were trained; paraphrase: prompts "
        "that never were; locality: prompts about subjects of no batch, answered as the original base does; "
        "shuffled facts: the answers to the efficacy prompts against another fact's object. A guess among the "
        f"objects of a relation is right at {suite['chance']:.3f}. Wilson 95 % intervals for as many items as "
        "there are facts.",
        "",
        "| | " + " | ".join(arms) + " |",
        "|" + "---|" * (len(arms) + 1),
    ]
    for metric, row in cells.items():
        lines.append(f"| {TITLES[metric]} | " + " | ".join(_cell(row.get(arm)) for arm in arms) + " |")
    reasons: dict[str, dict[str, None]] = {}
    for row in cells.values():
        for arm, cell in row.items():
            if "not_run" in cell:
                reasons.setdefault(cell["not_run"], {})[arm] = None
    lines += (
        ["", *(f"Not run: {', '.join(where)}: {why}." for why, where in reasons.items())] if reasons else []
    )
    for metric, cell in suite.get("forgetting", {}).items():
        lines += [
            "",
            f"Forgetting, {TITLES[metric]} of the first batch: {cell['before']:.3f} before, {cell['now']:.3f} now: "
            f"{cell['forgotten']:+.3f} lost.",
        ]
    return lines


def _cell(cell: dict | None) -> str:
    if cell is None:
        return "–"
    if "not_run" in cell:
        return "not run"
    return f"{cell['accuracy']:.3f} [{cell['ci_low']:.3f}, {cell['ci_high']:.3f}] n={cell['n']} of {cell['facts']} facts"


def picture(name: str, suite: dict, path: str | Path) -> None:
    """A PNG picture: for each metric a bar an arm with its interval, and chance as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = cells_of(suite)
    arms = list(suite["metrics"]["efficacy"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.8 / len(arms)
    for place, arm in enumerate(arms):
        shown = [(x, row[arm]) for x, row in enumerate(cells.values()) if "accuracy" in row.get(arm, {})]
        at = [x + (place - (len(arms) - 1) / 2) * width for x, _ in shown]
        values = [cell["accuracy"] for _, cell in shown]
        spread = [[max(0.0, c["accuracy"] - c["ci_low"]) for _, c in shown]]
        spread += [[max(0.0, c["ci_high"] - c["accuracy"]) for _, c in shown]]
        axis.bar(at, values, width, label=arm, yerr=spread if shown else None, capsize=2)
    axis.axhline(suite["chance"], color="black", linewidth=0.8, linestyle=":", label="guess")
    axis.set_xticks(range(len(cells)), [TITLES[metric].replace(", ", ",\n") for metric in cells], fontsize=8)
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("share right")
    axis.set_title(f"{name}: facts asked without any context", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
