"""What an experiment is: a config, what it measures as tidy records, and how the records become tables and pictures.

`run(config, seed, progress)` yields one dict a measured item: the keys that tell cells apart (`arm`, `length`, ...), `unit`
(what it belongs to and is resampled with), and what was measured (`correct`, `loss`, ...). `item` tells the items of one unit
apart. A record with `not_run` in place of a measurement says why a cell is empty. The runner adds `seed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from memlayers.config import Strict
from memlayers.eval.statistics import Mean
from memlayers.limits import Seed

Record = dict[str, Any]
Progress = Callable[..., Any]
"""tqdm, shown or not: `for cell in progress(cells, desc="cells")`, or `bar = progress(total=9)` and `bar.update(1)`."""
Values = tuple[Any, ...]


def _check_unique(values: list) -> list:
    if len({str(value) for value in values}) < len(values):
        raise ValueError(f"{values} names a value twice")
    return values


Unique = AfterValidator(_check_unique)
"""For a list in a config that names nothing twice: `Annotated[list[int], Unique]`."""


class ExperimentConfig(Strict):
    """What all experiments have.

    Attributes:
        seeds: of items, starts and training; each is measured by itself, and their records stand in one file.
        resamples: of the bootstrap.
        note: for the report, how the settings were chosen.
    """

    seeds: Annotated[list[Seed], Unique] = Field([0, 1, 2], min_length=1)
    resamples: int = Field(2000, ge=100, le=1_000_000)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class View:
    """Some figures of the records, as a table or a picture.

    Attributes:
        title: of the section; `{suite}` stands for the value of a key in `by`. A picture is saved as its `file`.
        metrics: names of the experiment's metrics.
        by: keys; each combination of their values is a table or a picture of its own.
        where: key to the values that are shown; default: all.
        text: a sentence or two for the reader.
    """

    title: str
    metrics: tuple[str, ...]
    by: tuple[str, ...] = ()
    where: Mapping[str, Values] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Table(View):
    """Figures with their intervals: the values of `rows` down; those of `cols` across, or else the metrics."""

    rows: tuple[str, ...]
    cols: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gains(View):
    """What arms have more than another arm on the same items: bootstrap over units, exact McNemar test, Holm over all.

    Attributes:
        of: the arms; None: all but `over` and the controls.
        over: the arm that they are compared with.
        rows: keys down.
    """

    rows: tuple[str, ...]
    over: str
    of: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Picture(View):
    """A picture: `x` across, a panel for each combination of `panels`."""

    file: str
    x: str
    panels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lines(Picture):
    """A line with its band of intervals for each value of `hue`. log: both axes on a logarithmic scale."""

    hue: str
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars(Picture):
    """A bar with its interval for each value of `x`, side by side for each value of `hue`."""

    hue: str | None = None


@dataclass(frozen=True, kw_only=True)
class Heatmap(Picture):
    """Colours and numbers over `x` and `y`."""

    y: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment; `registry.EXPERIMENTS` has them by name.

    Attributes:
        title, about: head of the report, and a paragraph on what is measured and how it counts.
        config: its config, a subclass of `ExperimentConfig`.
        run: measures one seed.
        keys: fields of a record that tell cells apart.
        unit: what a unit is, in the singular: "haystack".
        metrics, views: what the report shows.
        compared: the key whose values are compared with each other on the same items.
        controls: values of `compared` that must not be right more often than by chance (`chance` in their records).
        measure: `measure(config, models, seed, progress)`, where models in memory can be measured too.
    """

    title: str
    about: str
    config: type[ExperimentConfig]
    run: Callable[[Any, int, Progress], Iterator[Record]]
    keys: tuple[str, ...]
    unit: str
    metrics: tuple[Mean, ...]
    views: tuple[View, ...]
    compared: str = "arm"
    controls: tuple[str, ...] = ()
    measure: Callable[..., Iterator[Record]] | None = None

    def metric(self, name: str) -> Mean:
        """The metric of this name."""
        return next(metric for metric in self.metrics if metric.name == name)
