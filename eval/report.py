"""From answers to report.json, samples.jsonl, report.md and heatmaps."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

from memlayers.eval.config import ARMS, CONTROLS, REGIMES, EvalConfig
from memlayers.eval.output import write_output
from memlayers.eval.statistics import holm, mcnemar, paired_bootstrap, wilson
from memlayers.eval.suites import facts_report, mqar_report

Key = tuple[str, str, int, str]  # suite, regime, length, arm or control


def build_report(
    config: EvalConfig,
    window: int,
    lengths: dict[str, list[int]],
    records: dict[Key, list[dict]],
    skipped: dict[Key, str],
) -> dict:
    """The contents of report.json, but for `versions` and `wall_s`.

    lengths: suite -> its lengths in tokens. records: one row a question, for each arm or control of a cell;
    the rows of all arms of a cell are about the same questions in the same order. skipped: why a cell was not
    run.

    results[suite][regime][length][arm] = {n, accuracy, ci_low, ci_high} (Wilson) or {not_run: reason};
    controls the same; substring: RULER's score in the same places; cells[suite][regime][length][arm][depth]:
    the length × depth grid; gain[suite][regime][length]: trained − base_cut with a paired bootstrap interval
    over haystacks, McNemar's exact p and Holm's adjustment over all gains of the report.
    """
    report: dict = {name: {} for name in ("results", "controls", "substring", "cells", "gain")}
    for suite, suite_config in config.haystacks.items():
        for regime in suite_config.regimes:
            for length in lengths[suite]:
                for group, names in (("results", config.arms), ("controls", config.controls)):
                    for name in names:
                        key = (suite, regime, length, name)
                        rows = records.get(key)
                        cell = interval(rows) if rows else {"not_run": skipped[key]}
                        _put(report[group], key, cell)
                        if rows:
                            _put(report["substring"], key, sum(row["substring"] for row in rows) / len(rows))
                            _put(report["cells"], key, _by_depth(rows))
                gain = _gain(suite, regime, length, records, config)
                if gain:
                    report["gain"].setdefault(suite, {}).setdefault(regime, {})[str(length)] = gain
    gains = [cell for regimes in report["gain"].values() for by in regimes.values() for cell in by.values()]
    for cell, p in zip(gains, holm([cell["p_mcnemar"] for cell in gains])):
        cell["p_holm"] = p
    report["config"] = {**config.model_dump(), "window": window}
    return report


def interval(rows: list[dict]) -> dict:
    """Accuracy of `rows` with Wilson's 95 % interval."""
    correct = sum(row["correct"] for row in rows)
    low, high = wilson(correct, len(rows))
    return {"n": len(rows), "accuracy": correct / len(rows), "ci_low": low, "ci_high": high}


def _by_depth(rows: list[dict]) -> dict[str, dict]:
    by_depth = defaultdict(list)
    for row in rows:
        by_depth[row["depth"]].append(row)
    return {str(depth): interval(by_depth[depth]) for depth in sorted(by_depth)}


def _gain(
    suite: str, regime: str, length: int, records: dict[Key, list[dict]], config: EvalConfig
) -> dict | None:
    trained, cut = (records.get((suite, regime, length, arm)) for arm in ("trained", "base_cut"))
    if not trained or not cut:
        return None
    differences = [int(a["correct"]) - int(b["correct"]) for a, b in zip(trained, cut, strict=True)]
    bounds = paired_bootstrap(
        differences, [row["haystack"] for row in trained], resamples=config.resamples, seed=config.seed
    )
    return {
        "n": len(differences),
        "gain": sum(differences) / len(differences),
        "ci_low": bounds[0] if bounds else None,
        "ci_high": bounds[1] if bounds else None,
        "p_mcnemar": mcnemar([row["correct"] for row in trained], [row["correct"] for row in cut]),
    }


def _put(tree: dict, key: Key, value) -> None:
    suite, regime, length, name = key
    tree.setdefault(suite, {}).setdefault(regime, {}).setdefault(str(length), {})[name] = value


def write_report(report: dict, samples: list[dict], folder: Path) -> None:
    """Writes report.json, samples.jsonl, report.md and `<suite>.png` into `folder`; raises as `write_output`."""
    pictures = {f"{suite}.png": functools.partial(heatmap, report, suite) for suite in report["results"]}
    for kind, module in (("facts", facts_report), ("mqar", mqar_report)):
        for suite, block in report.get(kind, {}).items():
            pictures[f"{suite}.png"] = functools.partial(module.picture, suite, block)
    write_output(folder, {"report.md": markdown(report)}, pictures, report, samples)


def heatmap(report: dict, suite: str, path: str | Path) -> None:
    """A PNG picture: length × depth, trained beside base_cut, accuracy as colour and number, n in each cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    regimes, arms = report["results"][suite], ("trained", "base_cut")
    lengths = list(next(iter(regimes.values())))
    depths = [str(depth) for depth in sorted(report["config"]["suites"][suite]["depths"])]
    size = (2 * (1.6 + 0.85 * len(lengths)), len(regimes) * (1.3 + 0.55 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(regimes), 2, squeeze=False)
    for row, regime in zip(axes, regimes):
        for ax, arm in zip(row, arms):
            grid = [
                [
                    report["cells"].get(suite, {}).get(regime, {}).get(n, {}).get(arm, {}).get(d)
                    for n in lengths
                ]
                for d in depths
            ]
            values = [[float("nan") if cell is None else cell["accuracy"] for cell in line] for line in grid]
            image = ax.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(grid):
                for x, cell in enumerate(line):
                    text = "not run" if cell is None else f"{cell['accuracy']:.2f}\nn={cell['n']}"
                    colour = "white" if cell is not None and cell["accuracy"] < 0.6 else "black"
                    ax.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
            ax.set_xticks(range(len(lengths)), lengths)
            ax.set_yticks(range(len(depths)), depths)
            ax.set_xlabel("length (tokens)")
            ax.set_ylabel("depth (0 = start)")
            ax.set_title(f"{arm}, regime {regime}", fontsize=9)
    figure.colorbar(image, ax=axes, label="exact match")
    figure.suptitle(f"{suite}, window {report['config']['window']} tokens", fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def markdown(report: dict) -> str:
    """The report as tables for a person."""
    config = report["config"]
    lines = [
        f"# What {config['model']} remembers",
        "",
        f"Window: {config['window']} tokens. Seed {config['seed']}.",
    ]
    if report["results"]:
        lines[-1] += (
            " Exact match of the first span of the expected type, with Wilson 95 % intervals. Lengths count "
            "context, question and answer in tokens of the model's tokenizer."
        )
    if any(block.get("task", {}).get("n_questions", 1) > 1 for block in config["suites"].values()):
        lines += [
            "",
            "Questions about one haystack are not independent: the gain's intervals draw whole haystacks.",
        ]
    for suite, regimes in report["results"].items():
        for regime, cells in regimes.items():
            lines += ["", f"## {suite}, regime {regime}: {REGIMES[regime]}", ""]
            lines += _table(cells, [arm for arm in ARMS if arm in config["arms"]])
            controls = [name for name in CONTROLS if name in config["controls"]]
            if controls:
                lines += ["", "Controls (share answered with a key that should not be known):", ""]
                lines += _table(report["controls"][suite][regime], controls)
            lines += _gain_table(report["gain"].get(suite, {}).get(regime, {}))
            lines += _substring_line(report["substring"].get(suite, {}).get(regime, {}))
            lines += _reasons({**cells}, report["controls"].get(suite, {}).get(regime, {}))
    for suite, block in report.get("facts", {}).items():
        lines += facts_report.markdown(suite, block)
    for suite, block in report.get("mqar", {}).items():
        lines += mqar_report.markdown(suite, block, config)
    if "perplexity" in report:
        lines += _perplexity_table(report["perplexity"], config["perplexity"])
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines += ["", f"{versions}. {report['wall_s']:.0f} s.", ""]
    return "\n".join(lines)


def _table(cells: dict, names: list[str]) -> list[str]:
    lines = ["| length | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for length, row in cells.items():
        lines.append(f"| {length} | " + " | ".join(_cell(row[name]) for name in names) + " |")
    return lines


def _cell(cell: dict) -> str:
    if "not_run" in cell:
        return "not run"
    return f"{cell['accuracy']:.3f} [{cell['ci_low']:.3f}, {cell['ci_high']:.3f}] n={cell['n']}"


def _gain_table(gains: dict) -> list[str]:
    if not gains:
        return []
    lines = [
        "",
        "Memory gain, trained − base_cut (paired bootstrap over haystacks; exact McNemar, Holm):",
        "",
    ]
    lines += ["| length | gain | 95 % interval | p | p (Holm) |", "|---|---|---|---|---|"]
    for length, cell in gains.items():
        low, high = cell["ci_low"], cell["ci_high"]
        bounds = "one haystack" if low is None else f"[{low:+.3f}, {high:+.3f}]"
        p, adjusted = f"{cell['p_mcnemar']:.2g}", f"{cell['p_holm']:.2g}"
        lines.append(f"| {length} | {cell['gain']:+.3f} | {bounds} | {p} | {adjusted} |")
    return lines


def _perplexity_table(cells: dict, block: dict) -> list[str]:
    lines = [
        "",
        f"## Perplexity on unseen prose ({Path(block['file']).name}, {block['windows']} windows a sequence)",
        "",
    ]
    lines += ["| arm | perplexity | 95 % interval | tokens |", "|---|---|---|---|"]
    for arm, cell in cells.items():
        if "not_run" in cell:
            lines.append(f"| {arm} | not run: {cell['not_run']} | | |")
        else:
            bounds = f"[{cell['ci_low']:.2f}, {cell['ci_high']:.2f}]"
            lines.append(f"| {arm} | {cell['perplexity']:.2f} | {bounds} | {cell['tokens']:,} |")
    return lines


def _substring_line(scores: dict) -> list[str]:
    shown = [f"{length}: {row['trained']:.3f}" for length, row in scores.items() if "trained" in row]
    return ["", "RULER's substring score, trained: " + ", ".join(shown) + "."] if shown else []


def _reasons(*groups: dict) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for cells in groups:
        for length, row in cells.items():
            for name, cell in row.items():
                if "not_run" in cell:
                    reasons[cell["not_run"]].append(f"{name} at {length}")
    return (
        ["", *(f"Not run: {', '.join(where)}: {reason.rstrip('.')}." for reason, where in reasons.items())]
        if reasons
        else []
    )
