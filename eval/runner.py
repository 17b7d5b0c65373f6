"""Runs an experiment: seed after seed into records.jsonl, then the report. Interrupted, it goes on where it stopped.

The first line of records.jsonl says what was measured: the experiment, its config and the hash of both. A folder whose
records have another hash is an error that names the fields that differ; seeds that are there are not measured again.
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from memlayers.config import ConfigError, validate
from memlayers.eval import pages, pictures, registry, report
from memlayers.eval.experiment import Experiment, ExperimentConfig, Picture, Record
from memlayers.eval.models import IN_MEMORY, InMemory
from memlayers.eval.output import RECORDS, REPORT, check_output, read_records, write_output
from memlayers.files import file_checksum
from memlayers.files.checksums import json_checksum
from memlayers.yaml_config import apply_override, read_yaml

FREE = ("seeds", "note")
"""Fields of a config that two measurements may differ in and still be one."""
PACKAGES = ("memlayers", "torch", "transformers", "peft", "scipy", "pandas")


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        head: first line of records.jsonl: {experiment, config, config_hash, seeds: {seed: where it ran}}.
        records: a dict a measured item.
        report: what report.json holds: {title, warnings, tables, ...}.
        pictures: name of a file to the bytes of a PNG.
        texts: report.md and report.html.
        sections: their tables.
    """

    head: dict
    records: list[Record]
    report: dict
    pictures: dict[str, bytes]
    texts: dict[str, str]
    sections: list[pages.Section]

    def cell(self, **keys: Any) -> dict:
        """The first cell of a table with these keys (`arm="trained", length=64, metric="accuracy"`).

        Raises:
            KeyError: no table has it.
        """
        for table in self.report["tables"]:
            for cell in table["cells"]:
                if all(cell.get(key) == value for key, value in keys.items()):
                    return cell
        raise KeyError(f"no table has a cell with {keys}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads an experiment's YAML file with overrides such as `suites.passkey.n=100`.

    Raises `FileNotFoundError`, or `ConfigError` whose message starts with the path of the field.
    """
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    if "experiment" not in data:
        raise ConfigError(f"experiment: is missing in {path}; it is one of {', '.join(registry.EXPERIMENTS)}")
    return validate(registry.find(data["experiment"]).config, data)


def evaluate(config: ExperimentConfig, output_dir: str | Path, progress: bool = True) -> Results:
    """Measure every seed that is not there yet, and write records.jsonl, report.md, report.html, report.json and pictures.

    Raises:
        ConfigError: `output_dir` has records of another config; names the fields that differ.
        FileExistsError: `output_dir` holds such files of others.
        ImportError: pandas is missing; names the extra.
    """
    report.pandas()
    folder = Path(output_dir)
    check_output(folder, (RECORDS, REPORT))
    experiment, head = registry.find(config.experiment), head_of(config)
    records: list[Record] = []
    if (folder / RECORDS).is_file():
        before, records = read_records(folder)
        check_same_config(before, head, str(folder))
        head["seeds"] = before["seeds"]
    for seed in config.seeds:
        if str(seed) in head["seeds"]:
            continue
        measured, where = _measure(config, experiment.run, seed, progress)
        records += measured
        head["seeds"][str(seed)] = where
        write_output(folder, {RECORDS: _lines(head, records)})
    results = make_report(experiment, head, records)
    texts = {RECORDS: _lines(head, records), **results.texts}
    write_output(folder, texts, results.pictures, results.report)
    return results


def evaluate_model(
    model,
    tokenizer,
    experiment: str = "recall",
    base=None,
    output_dir: str | Path | None = None,
    progress: bool = False,
    **fields,
) -> Results:
    """Measure a model in memory, wrapped or plain.

    Args:
        experiment: recall, facts, pairs or perplexity.
        base: the plain model of the base arms; default: `model` without its memory, which is the original base only if
            training left it frozen.
        output_dir: where to write the files; None writes nothing.
        fields: of the experiment's config, such as `suites={...}`, `controls=[...]`, `seeds=[1]`.

    Raises:
        ConfigError: a wrong field, or an experiment that trains models of its own.
    """
    report.pandas()
    found = registry.find(experiment)
    if found.measure is None:
        raise ConfigError(f"experiment: {experiment} makes its models itself; use evaluate() with its config")
    config = validate(found.config, {"experiment": experiment, "model": IN_MEMORY, **fields})
    head, records, was_training = head_of(config), [], model.training
    try:
        for seed in config.seeds:
            run = functools.partial(_in_memory, found, model, tokenizer, base)
            measured, where = _measure(config, run, seed, progress)
            records += measured
            head["seeds"][str(seed)] = where
    finally:
        model.train(was_training)
    results = make_report(found, head, records)
    if output_dir is not None:
        texts = {RECORDS: _lines(head, records), **results.texts}
        write_output(output_dir, texts, results.pictures, results.report)
    return results


def _in_memory(experiment: Experiment, model, tokenizer, base, config, seed, bar) -> Iterator[Record]:
    return experiment.measure(config, InMemory(model, tokenizer, base, seed), seed, bar)


def _measure(config: ExperimentConfig, run, seed: int, progress: bool) -> tuple[list[Record], dict]:
    """The records of one seed, as JSON gives them back, and where and how long it ran."""
    started = time.perf_counter()
    bar = functools.partial(tqdm, disable=not progress, leave=False, mininterval=1)
    rows = [{"seed": seed, **row} for row in run(config, seed, bar)]
    where = {"device": device_name(), "threads": torch.get_num_threads(), "versions": versions()}
    return json.loads(json.dumps(rows)), {"wall_s": round(time.perf_counter() - started, 2), **where}


def head_of(config: ExperimentConfig) -> dict:
    """The first line of records.jsonl, before any seed. The hash is that of the config and of the models' files, so that a
    model that was trained on is another one."""
    block = config.model_dump(mode="json", exclude={"seeds"})
    fixed = {name: value for name, value in block.items() if name not in FREE}
    files = {name: _files(block[name]) for name in ("model", "base") if block.get(name)}
    return {
        "experiment": config.experiment,
        "config": block,
        "config_hash": json_checksum([fixed, files]),
        "files": files,
        "seeds": {},
    }


def _files(model: str) -> str:
    """The checksum of all files of a model's folder; of a hub id, that of nothing."""
    paths = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    return json_checksum([[str(path.relative_to(model)), file_checksum(path)] for path in paths])


def check_same_config(before: dict, now: dict, where: str, but: Sequence[str] = ()) -> None:
    """Raise `ConfigError` where two heads differ in a field that matters; names the fields. but: fields that may."""
    if before["config_hash"] == now["config_hash"]:
        return
    old, new = _fields(before["config"]), _fields(now["config"])
    names = [n for n in {**old, **new} if n.partition(".")[0] not in (*FREE, *but)]
    differ = [n for n in names if old.get(n) != new.get(n)]
    changed = [n for n in now.get("files", {}) if n not in but and before["files"].get(n) != now["files"][n]]
    if changed and not differ:
        raise ConfigError(
            f"{where}: {changed[0]} has changed since it was measured there; give another folder with --out"
        )
    if differ:
        values = "; ".join(f"{n} was {_short(old.get(n))}, is {_short(new.get(n))}" for n in differ)
        raise ConfigError(f"{where}: measured with another config ({values}); give another folder with --out")


def _fields(block: dict, path: str = "") -> dict[str, Any]:
    """The values of a config by their dotted paths."""
    found = {}
    for name, value in block.items():
        found |= (
            _fields(value, f"{path}{name}.")
            if isinstance(value, dict) and value
            else {f"{path}{name}": value}
        )
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lines(head: dict, records: Sequence[Record]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *records))


def make_report(
    experiment: Experiment, head: dict, records: Sequence[Record], runs: Sequence[str] = ()
) -> Results:
    """Everything that is shown of records. runs: their names, where several are put together (records have `run`)."""
    frame = report.to_frame(records)
    config, resamples = head["config"], head["config"]["resamples"]
    sections, tables = report.sections_of(experiment, frame, resamples)
    warnings = report.warnings_of(experiment, frame)
    drawn: dict[str, bytes] = {}
    for view in experiment.views:
        if not isinstance(view, Picture):
            continue
        cells = report.cells_of(experiment, frame, view, resamples)
        for at, part in report.by_values(cells, view.by):
            name, title = (text.format(**dict(zip(view.by, at))) for text in (view.file, view.title))
            drawn[f"{name}.png"] = pictures.draw(experiment, view, part, title)
            sections.append(pages.Section(title, view.text, picture=f"{name}.png"))
    title, about, foot = _words(experiment, head, runs)
    data = {"experiment": head["experiment"], "title": title, "config": config, "seeds": head["seeds"]}
    data |= {"warnings": warnings, "tables": tables}
    texts = {
        "report.md": pages.to_markdown(title, about, warnings, sections, foot),
        "report.html": pages.to_html(title, about, warnings, sections, foot, drawn),
    }
    return Results(head, list(records), data, drawn, texts, sections)


def _words(experiment: Experiment, head: dict, runs: Sequence[str]) -> tuple[str, str, str]:
    """Title, paragraph and last line of a report."""
    seeds = ", ".join(head["seeds"])
    model = ", ".join(runs) or head["config"].get("model") or head["config"].get("base", "")
    several = " (lowest to highest seed)" if len(head["seeds"]) > 1 else ""
    about = (
        f"{model}; seeds {seeds}. {experiment.about} Figures: value [95 % interval over {experiment.unit}s]{several}. "
        f"{head['config'].get('note', '')}"
    ).strip()
    last = next(iter(head["seeds"].values()))
    told = ", ".join(f"{name} {value}" for name, value in last["versions"].items())
    wall = sum(each["wall_s"] for each in head["seeds"].values())
    return experiment.title, about, f"{last['device']}, {last['threads']} threads; {told}; {wall:,.0f} s."


def device_name() -> str:
    """What it ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def versions() -> dict[str, str]:
    """Python and the packages that figures can depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
