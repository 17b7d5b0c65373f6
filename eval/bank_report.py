"""What a trial of the bank measured: cells, and the files that tell a person of it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from memlayers.eval.bank_items import PROMPTS
from memlayers.eval.output import read_samples, write_output
from memlayers.eval.statistics import paired_bootstrap, wilson
from memlayers.eval.summary import over_seeds, reports_of_seeds, seeds_of, table, versions_of

PARTS = {"all": ("kept", "deleted"), "kept": ("kept",), "deleted": ("deleted",), "stranger": ("stranger",)}
TITLES = {"trained": "prompts of the documents", "held_out": "held-out prompts"}
ONE = "one LoRA"


def share(answered: Sequence[tuple[str, bool]]) -> dict:
    """Share right, with Wilson's interval for as many items as there are documents.

    answered: document and whether it was right; questions about one document are not independent.
    """
    documents = len({document for document, _ in answered})
    accuracy = sum(right for _, right in answered) / len(answered)
    low, high = wilson(round(accuracy * documents), documents)
    return {"n": len(answered), "documents": documents, "accuracy": accuracy, "ci_low": low, "ci_high": high}


def cell(rows: Sequence[dict], **fields) -> dict:
    """`share` of the rows that have these fields; documents of two seeds are two."""
    found = [r for r in rows if all(r[name] == value for name, value in fields.items())]
    return share([(f"{r['seed']}:{r['document']}", r["correct"]) for r in found])


def measured(rows: Sequence[dict], top_k: Sequence[int], resamples: int, seed: int) -> dict:
    """{accuracy[arm][part][prompts], gain[arm][prompts]} of the rows of samples.jsonl, of one seed or of several."""
    accuracy: dict = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        for part, names in PARTS.items():
            in_part = [row for row in own if row["part"] in names]
            if len({row["part"] for row in in_part}) == len(names):
                kinds = {row["prompts"] for row in in_part}
                cells = {prompts: cell(in_part, prompts=prompts) for prompts in PROMPTS if prompts in kinds}
                accuracy.setdefault(arm, {})[part] = cells
    arms = [f"top-{k}" for k in top_k]
    gain = {arm: {p: _gain(rows, arm, p, resamples, seed) for p in PROMPTS} for arm in arms}
    return {"accuracy": accuracy, "gain": gain}


def _gain(rows: Sequence[dict], arm: str, prompts: str, resamples: int, seed: int) -> dict:
    """The arm less the one LoRA on the same questions, with a bootstrap over documents."""
    ours, one = (
        [r for r in rows if r["arm"] == name and r["prompts"] == prompts and r["part"] != "stranger"]
        for name in (arm, ONE)
    )
    differences = [int(a["correct"]) - int(b["correct"]) for a, b in zip(ours, one, strict=True)]
    clusters = [f"{row['seed']}:{row['document']}" for row in ours]
    low, high = paired_bootstrap(differences, clusters, resamples=resamples, seed=seed)
    return {
        "n": len(differences),
        "gain": sum(differences) / len(differences),
        "ci_low": low,
        "ci_high": high,
    }


def write(report: dict, samples: Sequence[dict], folder: Path) -> None:
    """samples.jsonl, recall.png, report.md and report.json; raises as `write_output`."""
    pictures = {"recall.png": lambda path: picture(report["accuracy"], report["chance"], path)}
    write_output(folder, {"report.md": markdown([report], report["gain"])}, pictures, report, samples)


def write_summary(folder: Path) -> None:
    """summary.md and recall.png of all seeds in `folder`.

    Raises `ValueError` where two of them were measured with different configs.
    """
    reports = reports_of_seeds(folder)
    config = reports[0]["config"]
    rows = [row for each in reports for row in read_samples(folder / f"seed{each['config']['seed']}", each)]
    pooled = measured(rows, config["top_k"], config["resamples"], seed=0)
    pictures = {"recall.png": lambda path: picture(pooled["accuracy"], reports[0]["chance"], path)}
    write_output(folder, {"summary.md": markdown(reports, pooled["gain"])}, pictures)


def markdown(reports: Sequence[dict], gain: dict) -> str:
    """Tables of one report, or of several; `gain` over all their questions."""
    first = reports[0]
    config, documents = first["config"], first["documents"]
    tokens = mean(report["documents"]["tokens"] for report in reports)
    per_seed = "mean over seeds (lowest to highest seed)," if len(reports) > 1 else "share right,"
    lines = [
        "# A bank of LoRA shards beside one LoRA",
        "",
        f"{config['model']}; seeds {seeds_of(reports)}; {documents['n']} documents a seed, each a shard, of {tokens:,.0f} "
        f"tokens together; {config['facts_per_document']} facts a document. Shards: rank {config['memory']['r']}, "
        f"{first['parameters']['shard']:,} parameters, {config['bank']['steps']} steps at rate "
        f"{config['bank']['learning_rate']:g}; the one LoRA: {first['parameters']['one']:,} parameters (all shards: "
        f"{documents['n'] * first['parameters']['shard']:,}), {documents['n'] * config['bank']['steps']:,} steps at "
        f"{config['one_learning_rate']:g}, batches of {config['bank']['batch_size']} segments of "
        f"{config['bank']['segment_length']} tokens for both.",
        "",
        f"Greedy answers without any context, exact: {per_seed} then Wilson's 95 % interval for all documents together. "
        f"A guess among the objects of a relation is right at {first['chance']:.3f}. {config['note']}".rstrip(),
    ]
    lines += ["", "## Recall", "", *_arms(reports, "all", after=False)]
    lines += ["", "Less the one LoRA, on the same questions (bootstrap over documents):", ""]
    rows = [[arm, *(_gain_text(cells[p]) for p in PROMPTS)] for arm, cells in gain.items()]
    lines += table(["arm", *TITLES.values()], rows)
    lines += [
        "",
        "False recall, about subjects of no document:",
        "",
        *_arms(reports, "stranger", after=False),
    ]
    lines += [
        "",
        "## Routing",
        "",
        "Share of questions whose own shard the router has first, or among its first three.",
        "",
    ]
    lines += table(["", *TITLES.values()], list(_routing(reports)))
    if config["temperatures"]:
        lines += _temperatures(reports)
    lines += _deletion(reports)
    lines += ["", "## Seconds of the CPU", ""]
    lines += table(
        ["", "each"], [[name, over_seeds(_seconds(reports, name), "mean", 2)] for name in first["seconds"]]
    )
    lines += ["", f"{first['device']}, {first['threads']} thread; {versions_of(first)}.", ""]
    return "\n".join(lines)


def _arms(reports: Sequence[dict], part: str, after: bool) -> list[str]:
    accuracy = reports[0]["accuracy"]
    arms = [arm for arm, cells in accuracy.items() if part in cells and ("after" in arm) <= after]
    kinds = [prompts for prompts in PROMPTS if prompts in accuracy[arms[0]][part]]
    rows = [[arm, *(_text(reports, ["accuracy", arm, part, p]) for p in kinds)] for arm in arms]
    return table(["arm", *(TITLES[p] for p in kinds)], rows)


def _text(reports: Sequence[dict], path: Sequence[str]) -> str:
    """Mean over seeds of the cell at `path`, and Wilson's interval for the documents of all seeds."""
    cells = [functools.reduce(operator.getitem, path, report) for report in reports]
    right, documents = sum(c["accuracy"] * c["documents"] for c in cells), sum(c["documents"] for c in cells)
    low, high = wilson(round(right), documents)
    return f"{over_seeds(cells, 'accuracy', 3)} [{low:.3f}, {high:.3f}]"


def _gain_text(found: dict) -> str:
    return f"{found['gain']:+.3f} [{found['ci_low']:+.3f}, {found['ci_high']:+.3f}]"


def _routing(reports: Sequence[dict]):
    for when, told in (("before", "of {} shards"), ("after", "of {} shards, after deletion")):
        n = reports[0]["documents"]["n"] if when == "before" else reports[0]["deletion"]["shards_left"]
        for k in ("top-1", "top-3"):
            yield [f"{k} {told.format(n)}", *(_text(reports, ["routing", when, p, k]) for p in PROMPTS)]


def _temperatures(reports: Sequence[dict]) -> list[str]:
    block, used = reports[0]["routing"]["temperatures"], reports[0]["config"]["bank"]["temperature"]
    path = ["routing", "temperatures", "cells"]
    rows = [[t, _text(reports, [*path, t])] for t in block["cells"]]
    head = ["temperature", TITLES["held_out"]]
    told = f"top-{block['top_k']} with other weights: the softmax of scores / temperature (the bank's own: {used:g})."
    return ["", told, "", *table(head, rows)]


def _deletion(reports: Sequence[dict]) -> list[str]:
    n = reports[0]["config"]["n_deleted"]
    same = [
        all(r["deletion"][f"{what}_of_kept_shards_identical"] for r in reports)
        for what in ("files", "answers")
    ]
    lines = [
        "",
        f"## Deletion of {n} documents",
        "",
        f"The files of the shards that stay are {'' if same[0] else 'NOT '}byte for byte those of before, and what each "
        f"says about its own document is {'' if same[1] else 'NOT '}the same. The one LoRA is trained again on the "
        "documents that stay, with as many steps for each.",
    ]
    for part in ("kept", "deleted"):
        lines += ["", f"Questions about the documents that are {part}:", ""]
        lines += _arms(reports, part, after=True)
    return lines


def _seconds(reports: Sequence[dict], name: str) -> list[dict]:
    return [report["seconds"][name] for report in reports]


def picture(accuracy: dict, chance: float, path: str | Path) -> None:
    """A PNG picture: a bar an arm for each kind of prompt, with its interval; recall, and recall of what was deleted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, part in zip(figure.subplots(1, 3, sharey=True), ("all", "kept", "deleted")):
        arms = [a for a, cells in accuracy.items() if part in cells and ("after" in a) == (part != "all")]
        for place, prompts in enumerate(PROMPTS):
            cells = [accuracy[arm][part][prompts] for arm in arms]
            values = [c["accuracy"] for c in cells]
            spread = [
                [max(0.0, c["accuracy"] - c["ci_low"]) for c in cells],
                [max(0.0, c["ci_high"] - c["accuracy"]) for c in cells],
            ]
            at = [x + (place - 0.5) * 0.4 for x in range(len(arms))]
            axis.bar(at, values, 0.4, yerr=spread, capsize=2, label=TITLES[prompts])
        axis.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="guess")
        names = [arm.removesuffix(", after deletion") for arm in arms]
        axis.set_xticks(range(len(arms)), names, rotation=40, ha="right", fontsize=8)
        titles = {"kept": "after deletion: documents kept", "deleted": "after deletion: documents deleted"}
        axis.set_title(titles.get(part, "all documents"), fontsize=10)
        axis.set_ylim(0, 1.03)
    figure.axes[0].set_ylabel("share right, without context")
    figure.axes[2].legend(fontsize=8)  # where bars are low
    figure.savefig(path, format="png", dpi=120)
