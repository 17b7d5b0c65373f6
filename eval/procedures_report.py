"""What a trial of learned procedures measured: cells, and the files that tell a person of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from memlayers.eval.output import read_samples, write_output
from memlayers.eval.statistics import paired_bootstrap, wilson
from memlayers.eval.summary import over_seeds, reports_of_seeds, seeds_of, table, versions_of

FIELDS = {"correct": "accuracy", "routed": "routing"}


def measured(rows: Sequence[dict], resamples: int, seed: int) -> dict:
    """{accuracy[arm][after][batch], drop[arm][after]} of the rows of samples.jsonl, of one seed or of several.

    A cell has n, accuracy and routing (shares); batch "all" is every procedure asked for then, "earlier" those of the
    batches before the last. A drop has, for accuracy and routing, what the earlier ones had right after their own batch
    less what they have now, with a bootstrap over procedures.
    """
    by_time: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_time[row["arm"]][str(row["after"])].append(row)
    accuracy: dict = {}
    drop: dict = {}
    for arm, times in by_time.items():
        for after, asked in times.items():
            parts = {
                str(b): [r for r in asked if r["batch"] == b] for b in sorted({r["batch"] for r in asked})
            }
            parts |= {"earlier": [r for r in asked if r["batch"] < int(after)], "all": asked}
            accuracy.setdefault(arm, {})[after] = {name: _cell(part) for name, part in parts.items() if part}
            if parts["earlier"]:
                learned = {_key(r): r for b in times for r in times[b] if str(r["batch"]) == b}
                pairs = [(learned[_key(now)], now) for now in parts["earlier"]]
                drop.setdefault(arm, {})[after] = {
                    name: _drop(pairs, field, resamples, seed) for field, name in FIELDS.items()
                }
    return {"accuracy": accuracy, "drop": drop}


def _cell(rows: Sequence[dict]) -> dict:
    shares = {name: sum(row[field] for row in rows) / len(rows) for field, name in FIELDS.items()}
    return {"n": len(rows), "procedures": len({(r["seed"], r["procedure"]) for r in rows}), **shares}


def _key(row: dict) -> tuple:
    return row["seed"], row["procedure"], row["query"]


def _drop(pairs: Sequence[tuple[dict, dict]], field: str, resamples: int, seed: int) -> dict:
    differences = [int(then[field]) - int(now[field]) for then, now in pairs]
    clusters = [f"{now['seed']}:{now['procedure']}" for _, now in pairs]
    low, high = paired_bootstrap(differences, clusters, resamples=resamples, seed=seed) or (None, None)
    return {"n": len(pairs), "drop": sum(differences) / len(pairs), "ci_low": low, "ci_high": high}


def write(report: dict, samples: Sequence[dict], folder: Path) -> None:
    """samples.jsonl, procedures.png, report.md and report.json; raises as `write_output`."""
    pictures = {"procedures.png": lambda path: picture([report], path)}
    write_output(folder, {"report.md": markdown([report], report["drop"])}, pictures, report, samples)


def write_summary(folder: Path) -> None:
    """summary.md and procedures.png of all seeds in `folder`.

    Raises `ValueError` where two of them were measured with different configs.
    """
    reports = reports_of_seeds(folder)
    rows = [row for each in reports for row in read_samples(folder / f"seed{each['config']['seed']}", each)]
    pooled = measured(rows, reports[0]["config"]["resamples"], seed=0)
    pictures = {"procedures.png": lambda path: picture(reports, path)}
    write_output(folder, {"summary.md": markdown(reports, pooled["drop"])}, pictures)


def markdown(reports: Sequence[dict], drop: dict) -> str:
    """Tables of one report, or of several; `drop` over all their queries."""
    first = reports[0]
    config, arms = first["config"], first["config"]["arms"]
    last = str(config["batches"])
    n = config["batch_procedures"]
    shown = "mean over seeds (lowest to highest seed)" if len(reports) > 1 else "one seed"
    lines = [
        "# Procedures learned one batch after the other",
        "",
        f"{config['base']}, {first['base_parameters']:,} parameters; seeds {seeds_of(reports)}, each with names, "
        f"procedures and uses of its own. {config['batches']} batches of {n} procedures, {config['steps']} steps of {config['batch_size']} uses "
        f"a batch for every arm; {config['queries']} queries of each procedure. Shares of answers that are right in every "
        f"symbol, {shown}; of greedy `generate`, the call of the procedure included. {config['note']}".rstrip(),
        "",
        "## Without learning",
        "",
        *table(
            ["arm", "accuracy"],
            [[arm, _text(reports, arm, "0", "all", "accuracy")] for arm in ("base", "prompt")],
        ),
        "",
        "prompt: the definition of the procedure stands in the prompt.",
        "",
        f"## After all {last} batches",
        "",
    ]
    head = [
        "arm",
        "parameters",
        "learning rate",
        "accuracy",
        "routing",
        "drop of earlier ones",
        "of their routing",
        "s of the CPU",
    ]
    body = [
        [
            arm,
            f"{first['arms'][arm]['parameters']:,}",
            f"{settings['learning_rate']:g}",
            _text(reports, arm, last, "all", "accuracy"),
            _text(reports, arm, last, "all", "routing"),
            _drop_text(drop, arm, last, "accuracy"),
            _drop_text(drop, arm, last, "routing"),
            over_seeds([r["arms"][arm] for r in reports], "train_cpu_s", 0),
        ]
        for arm, settings in arms.items()
    ]
    lines += table(head, body)
    lines += [
        "",
        "Routing: the first token said is the procedure's own (a LoRA: its first token is right). Drop: what a procedure had "
        "right after its own batch less what it has now, with a bootstrap over procedures.",
    ]
    for arm in arms:
        lines += ["", f"## {arm}", ""]
        batches = [str(b + 1) for b in range(config["batches"])]
        body = [
            [
                after,
                *(_text(reports, arm, after, b, "accuracy") if b <= after else "" for b in batches),
                _text(reports, arm, after, "all", "routing"),
                _drop_text(drop, arm, after, "accuracy"),
            ]
            for after in batches
        ]
        lines += table(
            ["after batch", *(f"batch {b}" for b in batches), "routing", "drop of earlier ones"], body
        )
        if controls := [name for name in first["accuracy"] if name.startswith(f"{arm}: ")]:
            identical = all(r["arms"][arm]["earlier_rows_and_base_identical"] for r in reports)
            cells = ", ".join(
                f"{c.split(': ')[1]} {_text(reports, c, '0', 'all', 'accuracy')}" for c in controls
            )
            lines += [
                "",
                f"After each batch the base and the rows of earlier batches are {'' if identical else 'NOT '}bit for bit "
                f"those of before. At the end: {cells}.",
            ]
    lines += ["", f"{first['device']}, {first['threads']} thread; {versions_of(first)}.", ""]
    return "\n".join(lines)


def _text(reports: Sequence[dict], arm: str, after: str, batch: str, field: str) -> str:
    """Mean over seeds and, of accuracy, Wilson's interval for as many items as there are procedures."""
    cells = [report["accuracy"][arm][after][batch] for report in reports]
    told = over_seeds(cells, field, 3)
    if field != "accuracy" or batch != "all":
        return told
    procedures = sum(cell["procedures"] for cell in cells)
    low, high = wilson(round(mean(cell[field] for cell in cells) * procedures), procedures)
    return f"{told} [{low:.3f}, {high:.3f}]"


def _drop_text(drop: dict, arm: str, after: str, name: str) -> str:
    cell = drop.get(arm, {}).get(after, {}).get(name)
    if cell is None:
        return ""
    bounds = "" if cell["ci_low"] is None else f" [{cell['ci_low']:+.4f}, {cell['ci_high']:+.4f}]"
    return f"{cell['drop']:+.4f}{bounds}"


def picture(reports: Sequence[dict], path: str | Path) -> None:
    """A PNG picture: an arm a panel; accuracy on each batch after each later one, mean and range over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = reports[0]["config"]
    arms, batches = list(config["arms"]), range(1, config["batches"] + 1)
    prompt = mean(report["accuracy"]["prompt"]["0"]["all"]["accuracy"] for report in reports)
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis in axes:
        axis.set_visible(False)
    for axis, arm in zip(axes, arms):
        axis.set_visible(True)
        for batch in batches:
            times = [after for after in batches if after >= batch]
            values = [[r["accuracy"][arm][str(a)][str(batch)]["accuracy"] for r in reports] for a in times]
            axis.plot(times, [mean(v) for v in values], "o-", color=f"C{batch - 1}", label=f"batch {batch}")
            axis.fill_between(
                times, list(map(min, values)), list(map(max, values)), color=f"C{batch - 1}", alpha=0.2
            )
        axis.axhline(prompt, color="black", linewidth=0.8, linestyle=":", label="definition in the prompt")
        axis.set_title(arm, fontsize=10)
        axis.set_xticks(list(batches))
        axis.set_ylim(-0.02, 1.03)
        axis.set_xlabel("after batch")
    figure.axes[0].set_ylabel("share of right answers")
    figure.axes[0].legend(fontsize=7, loc="lower left")
    figure.savefig(path, format="png", dpi=120)
