"""The tables and the picture of `memlayers.eval.reversible`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import memlayers as ml
from memlayers.eval.summary import over_seeds, seeds_of, table, versions_of

CONTROLS = ("untrained", "shuffled", "most_frequent")
GIVEN = ("text", "memory", "shuffled_memory", "untrained_memory", "nothing")
"""What stands before the last segment of a sequence."""


def markdown(reports: Sequence[dict]) -> str:
    """Tables: what comes back, the controls beside it, and perplexities."""
    first = reports[0]
    config = first["config"]
    lines = [
        "# What a reversible memory gives back",
        "",
        f"{config['model']}, frozen; {config['file']}; seeds {seeds_of(reports)}: mean (lowest to highest). Ratio: tokens of text a "
        "memory token. Shares of unseen tokens, and of unseen segments as a whole, that come back exactly; 95 % intervals "
        f"of each seed are in its report.json. {config['note']}".rstrip(),
    ]
    if config["arms"]:
        lines += ["", *arms_table(reports)]
    cells = [report["continuation"] for report in reports if "continuation" in report]
    if cells:
        lines += [
            "",
            f"## Trained by {config['checkpoint']}",
            "",
            f"Ratio {cells[0]['ratio']:g}; unseen tokens that come back {over_seeds(cells, 'tokens', 3)}, segments "
            f"{over_seeds(cells, 'segments', 3)}. Perplexity of a segment after {config['context_segments']}, by what "
            "stands before it:",
            "",
        ]
        values = [over_seeds([c["perplexity"][given] for c in cells], "perplexity", 2) for given in GIVEN]
        lines += table([given.replace("_", " ") for given in GIVEN], [values])
    return "\n".join([*lines, "", f"{first['device']}, {first['threads']} thread; {versions_of(first)}.", ""])


def arms_table(reports: Sequence[dict]) -> list[str]:
    """What comes back, an arm a row, and the controls beside it."""
    config = reports[0]["config"]
    lines = [
        f"{config['steps']} steps of {config['batch_size']} segments at rate {config['learning_rate']:g} on the cycle loss:",
        "",
    ]
    head = ["arm", "ratio", "segment", "parameters", "tokens", "segments", "CPU s", *CONTROLS]
    rows = []
    for name, memory in config["arms"].items():
        cells = [report["arms"][name] for report in reports]
        length = ml.ReversibleMemoryConfig(**memory).segment_length
        counts = [f"{cells[0]['ratio']:g}", str(length), f"{cells[0]['parameters']:,}"]
        shares = [over_seeds(cells, field, 3) for field in ("tokens", "segments")]
        controls = [over_seeds([c["controls"][control] for c in cells], "tokens", 3) for control in CONTROLS]
        rows.append([name, *counts, *shares, over_seeds(cells, "cpu_s", 0), *controls])
    return lines + table(head, rows)


def picture(reports: Sequence[dict], path: str | Path) -> None:
    """A PNG picture: shares of tokens and of segments over the ratio; a mark an arm and seed, a line through the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = sorted({_family(arm) for arm in reports[0]["config"]["arms"].values()})
    for axis, field in zip(figure.subplots(1, 2), ("tokens", "segments")):
        for number, kind in enumerate(kinds):
            arms = [name for name, arm in reports[0]["config"]["arms"].items() if _family(arm) == kind]
            points = sorted(
                (reports[0]["arms"][name]["ratio"], [report["arms"][name][field] for report in reports])
                for name in arms
            )
            for ratio, values in points:
                axis.plot([ratio] * len(values), values, ".", color=f"C{number}")
            axis.plot(*zip(*((r, mean(v)) for r, v in points)), "-", color=f"C{number}", label=kind)
        axis.set_xscale("log", base=2)
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("tokens of text a memory token")
        axis.set_title(f"share of unseen {field} that comes back", fontsize=10)
        axis.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def _family(arm: dict) -> str:
    return f"{arm['backwards']}, {len(arm['ratios'])} level" + "s" * (len(arm["ratios"]) > 1)
