"""Tables and a picture of how much of a text a cartridge keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from memlayers.eval.output import write_output
from memlayers.eval.statistics import paired_bootstrap
from memlayers.eval.summary import reports_of_seeds, seeds_of, table, versions_of

BAR = 1.05
"""The perplexity beside that of reading that a cartridge is held to."""


def write_summary(folder: Path) -> None:
    """summary.md and perplexity.png of all seeds in `folder`; raises as `reports_of_seeds`."""
    write(reports_of_seeds(folder), folder, "summary.md")


def write(reports: Sequence[dict], folder: Path, name: str, report: dict | None = None) -> None:
    """The table as `name`, perplexity.png and, where one is given, report.json; raises as `write_output`."""
    rows = pooled(reports)
    pictures = {"perplexity.png": lambda path: picture(reports, rows, path)}
    write_output(folder, {name: markdown(reports, rows)}, pictures, report)


def pooled(reports: Sequence[dict]) -> list[dict]:
    """A row a source, arm and size, over the texts of all seeds, with 95 % intervals from a bootstrap over texts.

    Fields: `perplexity`; `ratio`, to reading the whole text; `kept`, the share of what the text helps, in log perplexity;
    both as (value, low, high); `by_seed`, the ratio of each seed.
    """
    resamples, rows = reports[0]["config"]["resamples"], []
    for cell in reports[0]["cells"]:
        arms = [
            {name: losses_of(report, cell, name) for name in ("whole text", "nothing", None)}
            for report in reports
        ]
        read, nothing, loss = (np.concatenate([arm[name] for arm in arms]) for name in arms[0])
        low, high = paired_bootstrap(loss - read, range(len(loss)), resamples=resamples)
        row = {key: cell[key] for key in ("texts", "arm", "tokens", "bytes")}
        row["n"] = len(loss)
        row["perplexity"] = math.exp(loss.mean())
        row["ratio"] = tuple(math.exp(x) for x in ((loss - read).mean(), low, high))
        row["by_seed"] = [math.exp((arm[None] - arm["whole text"]).mean()) for arm in arms]
        row["kept"] = kept(loss, read, nothing, resamples)
        rows.append(row)
    return rows


def losses_of(report: dict, cell: dict, arm: str | None) -> np.ndarray:
    """The losses (texts,) of the arm of `cell`, or of another one of the same texts, in a report."""
    same = ("texts", "arm", "tokens") if arm is None else ("texts", "arm")
    wanted = cell if arm is None else {"texts": cell["texts"], "arm": arm}
    (found,) = [c for c in report["cells"] if all(c[key] == wanted[key] for key in same)]
    return np.array(found["loss"])


def kept(loss: np.ndarray, read: np.ndarray, nothing: np.ndarray, resamples: int) -> tuple[float, ...]:
    """(nothing - loss) / (nothing - read) of sums over texts, with its interval."""
    gained, whole = nothing - loss, nothing - read
    if np.all(gained == whole) or not gained.any():  # the two arms themselves: nothing varies
        return (float(gained.any()),) * 3
    bounds = stats.bootstrap(
        (gained, whole),
        lambda x, y, axis=-1: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(gained.sum() / whole.sum()), float(bounds.low), float(bounds.high)


def markdown(reports: Sequence[dict], rows: Sequence[dict]) -> str:
    """A table a source: arms and sizes down."""
    first = reports[0]
    config, length = first["config"], first["config"]["text_length"]
    lines = [
        "# Perplexity of a continuation, with a cartridge in place of the text",
        "",
        f"{config['model']}; texts of {length} tokens, continuations of {config['continuation_length']}; seeds {seeds_of(reports)} "
        "(of the texts and of the continuations that the teacher draws), all their texts together. Beside reading: "
        "perplexity over that of reading the whole text [95 % bootstrap over texts] (lowest to highest seed). Kept: share of "
        "what the text helps, in log perplexity. Bytes: of the state, a text. "
        f"{' '.join(said(*item) for item in config['writers'].items())} {config['note']}".rstrip(),
    ]
    for source in config["texts"]:
        here = [row for row in rows if row["texts"] == source]
        of_file = config["texts"][source]["file"]
        lines += ["", f"## {source}: {here[0]['n']} texts, {of_file or 'drawn by the base itself'}", ""]
        lines += table(
            ["before the continuation", "tokens", "bytes", "perplexity", "beside reading", "kept"],
            [
                [
                    row["arm"],
                    str(row["tokens"]),
                    f"{row['bytes']:,}" if row["bytes"] else "",
                    f"{row['perplexity']:.3f}",
                    f"{interval(row['ratio'])} ({min(row['by_seed']):.3f} to {max(row['by_seed']):.3f})",
                    interval(row["kept"]),
                ]
                for row in here
            ],
        )
    seconds = {name: sum(report["cpu_s"][name] for report in reports) for name in first["cpu_s"]}
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    lines += [
        "",
        f"{first['device']}, {first['threads']} thread; of the CPU, for writing: {spent}; {versions_of(first)}.",
        "",
    ]
    return "\n".join(lines)


def said(name: str, writer: dict) -> str:
    """What a writer does, for the report."""
    distill = writer["distill"]
    what = (
        f"the text in segments of {writer['segment_length']} tokens"
        if distill is None
        else f"{distill['continuations']} continuations of {distill['length']} tokens drawn by the base behind the text, "
        f"{distill['batch'] or 'all'} a step"
    )
    steps = f"{writer['steps']} steps of {writer['optimizer']} at rate {writer['learning_rate']:g}"
    return f"{name[0].upper()}{name[1:]}: {steps} on {what}."


def interval(values: tuple[float, ...]) -> str:
    value, low, high = values
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def picture(reports: Sequence[dict], rows: Sequence[dict], path: str | Path) -> None:
    """A PNG picture: perplexity beside that of reading, over the tokens of the cartridge; a panel a source, a line an arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = reports[0]["config"]
    sources, arms = list(config["texts"]), ["last tokens", "not refined", *config["writers"]]
    figure = Figure(figsize=(4 * len(sources) + 0.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources):
        for number, arm in enumerate(arms):
            here = [row for row in rows if (row["texts"], row["arm"]) == (source, arm)]
            tokens = [row["tokens"] for row in here]
            value, low, high = zip(*(row["ratio"] for row in here))
            axis.plot(tokens, value, "o-", color=f"C{number}", label=arm, markersize=3)
            axis.fill_between(tokens, low, high, color=f"C{number}", alpha=0.2)
        (nothing,) = [row for row in rows if (row["texts"], row["arm"]) == (source, "nothing")]
        axis.axhline(nothing["ratio"][0], color="grey", linewidth=0.8, linestyle="--", label="nothing")
        axis.axhline(BAR, color="black", linewidth=0.8, linestyle=":", label=f"{BAR:g}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(config["sizes"], [str(size) for size in config["sizes"]])
        axis.set_ylim(0.97, 1.15 * nothing["ratio"][0])
        axis.set_xlabel(f"tokens of the cartridge, of {config['text_length']}")
        axis.set_title(source, fontsize=10)
    figure.axes[0].set_ylabel("perplexity beside reading the text")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, format="png", dpi=120)
