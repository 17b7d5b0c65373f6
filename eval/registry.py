"""All experiments by name: the `experiment:` of a config file. A new one is a file in `experiments/` and a line here."""

from __future__ import annotations

import difflib

from memlayers.config import ConfigError, shown
from memlayers.eval.experiment import Experiment
from memlayers.eval.experiments import (
    bank,
    bits,
    capacity,
    cartridge,
    facts,
    finetuned,
    pairs,
    perplexity,
    procedures,
    recall,
    reversible,
)

EXPERIMENTS: dict[str, Experiment] = {
    "recall": recall.EXPERIMENT,
    "facts": facts.EXPERIMENT,
    "pairs": pairs.EXPERIMENT,
    "perplexity": perplexity.EXPERIMENT,
    "bits": bits.EXPERIMENT,
    "capacity": capacity.EXPERIMENT,
    "bank": bank.EXPERIMENT,
    "procedures": procedures.EXPERIMENT,
    "cartridge": cartridge.EXPERIMENT,
    "reversible": reversible.EXPERIMENT,
    "finetuned": finetuned.EXPERIMENT,
}


def find(name: object) -> Experiment:
    """The experiment of this name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if isinstance(name, str) and name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(str(name), EXPERIMENTS, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"the experiments are {', '.join(EXPERIMENTS)}"
    raise ConfigError(
        f"experiment: {'is missing' if name is None else f'there is no {shown(name)}'}; {known}"
    )
