"""The tables and the picture of `memlayers.eval.bits`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from memlayers.eval.summary import over_seeds, seeds_of, table, versions_of


def best_of(report: dict, name: str, size: int) -> dict:
    """Of a kind's cells at one size that with the most bits, with `bits_a_byte`."""
    cells = [cell for cell in report["cells"] if (cell["name"], cell["size"]) == (name, size)]
    best = max(cells, key=lambda cell: cell["bits"])
    return {**best, "bits_a_byte": best["bits"] / best["bytes"]}


def markdown(reports: Sequence[dict]) -> str:
    """A table a kind, over its sizes."""
    first = reports[0]
    config = first["config"]
    lines = [
        "# Bits that a memory has room for",
        "",
        f"{config['model']}, frozen; seeds {seeds_of(reports)}: mean (lowest to highest). Texts of random tokens, each worth "
        f"log2({first['alphabet']}) = {math.log2(first['alphabet']):.2f} bits; what a memory keeps for a text is trained for "
        f"{config['steps']} steps to predict it. Bits: most of what was recalled of any length. Bytes: of what is kept, as "
        "it is saved. Of N: tokens that are the most likely ones behind those before them in a text of N tokens. Other "
        f"text: the same of another text with the same memory, of the longest. {config['note']}".rstrip(),
    ]
    for name, ladder in config["kinds"].items():
        lengths = [f"of {length}" for length in ladder["lengths"]]
        head = [ladder["field"], "bytes", "bits", "bits a byte", *lengths, "other text"]
        lines += ["", f"## {name}", "", *table(head, [row(reports, name, size) for size in ladder["sizes"]])]
    seconds = sum(cell["cpu_s"] for report in reports for cell in report["cells"])
    device = (
        f"{first['device']}, {first['threads']} thread; {seconds:.0f} s of the CPU; {versions_of(first)}."
    )
    return "\n".join([*lines, "", device, ""])


def row(reports: Sequence[dict], name: str, size: int) -> list[str]:
    """The cells of one kind at one size."""
    best = [best_of(report, name, size) for report in reports]
    shown = [over_seeds(best, "bits", 0), over_seeds(best, "bits_a_byte", 3)]
    for length in reports[0]["config"]["kinds"][name]["lengths"]:
        place = (name, size, length)
        cells = [c for r in reports for c in r["cells"] if (c["name"], c["size"], c["length"]) == place]
        shown.append(over_seeds(cells, "recalled", 0))
    return [str(size), f"{best[0]['bytes']:,}", *shown, over_seeds(cells, "other_text", 0)]


def picture(reports: Sequence[dict], path: str | Path) -> None:
    """A PNG picture: bits over bytes for every kind, and bits over tokens for those that are tokens; a band from the
    lowest to the highest seed, a dotted line as many times the bits of the smallest size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = reports[0]["config"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    by_bytes, by_tokens = figure.subplots(1, 2)
    limit = max(n for ladder in config["kinds"].values() for n in ladder["lengths"]) * math.log2(
        reports[0]["alphabet"]
    )
    for number, (name, ladder) in enumerate(config["kinds"].items()):
        cells = [[best_of(report, name, size) for report in reports] for size in ladder["sizes"]]
        axes = [(by_bytes, [each[0]["bytes"] for each in cells])]
        if ladder["field"] in ("n_tokens", "names"):
            axes.append((by_tokens, ladder["sizes"]))
        for axis, at in axes:
            values = [[cell["bits"] for cell in each] for each in cells]
            axis.plot(at, [mean(v) for v in values], "o-", color=f"C{number}", markersize=4, label=name)
            axis.fill_between(
                at, list(map(min, values)), list(map(max, values)), color=f"C{number}", alpha=0.2
            )
            if axis is by_tokens:
                each = mean(values[0]) / at[0]
                axis.plot(at, [min(each * x, limit) for x in at], ":", color=f"C{number}", linewidth=0.9)
    for axis, label in ((by_bytes, "bytes of state, or of what is kept for one text"), (by_tokens, "tokens")):
        axis.axhline(limit, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel(label)
        axis.set_ylabel("bits recalled")
        axis.legend(fontsize=8)
    by_bytes.text(
        by_bytes.get_xlim()[0], limit, " all of the longest text", fontsize=8, va="bottom", color="grey"
    )
    figure.savefig(path, format="png", dpi=120)
