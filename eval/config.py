"""The config of an evaluation: the YAML file, the Python argument and the `config` block of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from memlayers.config import ConfigError, Strict
from memlayers.eval.perplexity import PerplexityConfig
from memlayers.limits import MOST_TOKENS, Count, Seed, Share, Tokens
from memlayers.tasks import FactsConfig, HaystackConfig, MqarConfig
from memlayers.yaml_config import load_yaml

Regime = Literal["F", "W", "D"]
Arm = Literal["base", "base_cut", "memory_off", "untrained", "trained"]
Control = Literal["no_needle", "shuffled_memory", "zeroed_memory", "question_only"]

ARMS: tuple[str, ...] = ("base", "base_cut", "memory_off", "untrained", "trained")
CONTROLS: tuple[str, ...] = ("no_needle", "shuffled_memory", "zeroed_memory", "question_only")
REGIMES = {
    "F": "all in attention",
    "W": "one stream, attention limited to the window",
    "D": "written to memory, keys and values dropped, then asked",
}


class SuiteConfig(Strict):
    """A suite of texts: a task, and the grid of lengths and depths it is asked on (the default `type`).

    task: block of `memlayers.tasks` with `type: passkey`, `needle` or `updates`. lengths: tokens of context,
    question and answer. windows: in place of lengths, multiples of the tokens attention can reach. depths: 0
    = start of the context, 1 = end. n: questions at each length, spread evenly over the depths. regimes: F
    all in attention, W one stream through a limited window, D written to memory, then asked with nothing but
    the memory.
    """

    type: Literal["haystack"] = "haystack"
    task: HaystackConfig
    lengths: list[Tokens] | None = Field(None, min_length=1)
    windows: list[Tokens] | None = Field(None, min_length=1)
    depths: list[Share] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    n: Count = 200
    regimes: list[Regime] = Field(["F", "W", "D"], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> SuiteConfig:
        if (self.lengths is None) == (self.windows is None):
            raise ValueError(
                "lengths: give either lengths (tokens) or windows (multiples of the window), not both"
            )
        for field in ("lengths", "windows", "regimes", "depths"):
            values = getattr(self, field) or []
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: {values} names a value twice")
        return self


class FactsSuiteConfig(Strict):
    """A suite of facts, asked without any context (regime P), of the arms base, memory_off, untrained, trained.

    facts: the block that the facts were trained with. n: facts of a batch that are asked, the first so many;
    None: all. before: report.json of the same facts from before something else was learned; what the first
    batch lost since then is its forgetting.
    """

    type: Literal["facts"] = "facts"
    facts: FactsConfig = FactsConfig()
    n: Count | None = None
    before: str | None = None


class MqarSuiteConfig(Strict):
    """A suite of associative recall (MQAR): accuracy over the number of pairs.

    task: block of `memlayers.tasks` with `type: mqar`, without its number of pairs. n_pairs: those to ask. lengths:
    tokens of pairs and queries, each with every number of pairs; None: for each number of pairs the one length that
    `task.tokens_per_pair` gives it. n: rows in a cell, each with all its queries. regimes: as in a suite of texts.
    """

    type: Literal["mqar"] = "mqar"
    task: MqarConfig = MqarConfig()
    n_pairs: list[Count] = Field(min_length=1)
    lengths: list[Tokens] | None = Field(None, min_length=1)
    n: Count = 200
    regimes: list[Regime] = Field(["F", "W", "D"], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> MqarSuiteConfig:
        if self.task.n_pairs is not None:
            raise ConfigError("task.n_pairs: the suite's own n_pairs says how many; take this one out")
        if self.lengths is not None and self.task.tokens_per_pair is not None:
            raise ConfigError("lengths: give lengths or task.tokens_per_pair, not both")
        for field in ("n_pairs", "lengths", "regimes"):
            values = getattr(self, field) or []
            if len(set(values)) != len(values):
                raise ConfigError(f"{field}: {values} names a value twice")
        return self


def _suite_type(block: Any) -> str:
    named = block.get("type", "haystack") if isinstance(block, dict) else getattr(block, "type", "haystack")
    return str(named)


AnySuite = Annotated[
    Annotated[SuiteConfig, Tag("haystack")]
    | Annotated[FactsSuiteConfig, Tag("facts")]
    | Annotated[MqarSuiteConfig, Tag("mqar")],
    Discriminator(_suite_type),
]


class EvalConfig(Strict):
    """An evaluation: a checkpoint, suites, arms and controls.

    model: folder or hub id of a wrapped checkpoint (`memlayers.save`) or of a plain one. base: the checkpoint
    of the base arms; default: the one recorded in the wrapped checkpoint, that is the original one, also when
    the base was trained along. perplexity: also measure it on
    unseen prose. tokenizer: default: the model's, else the base's. window: tokens of the cut
    arms; default: the tokens attention can reach in the wrapped model. margin: tokens generated past the
    answer's length.
    """

    model: str
    base: str | None = None
    tokenizer: str | None = None
    suites: dict[str, AnySuite] = Field(min_length=1)
    perplexity: PerplexityConfig | None = None
    arms: list[Arm] = Field(list(ARMS))
    controls: list[Control] = Field(list(CONTROLS))
    window: Tokens | None = None
    batch_size: Count = 64
    margin: int = Field(4, ge=0, le=MOST_TOKENS)
    seed: Seed = 0
    resamples: int = Field(2000, ge=100, le=1_000_000)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def haystacks(self) -> dict[str, SuiteConfig]:
        """The suites of texts."""
        return {name: suite for name, suite in self.suites.items() if isinstance(suite, SuiteConfig)}

    @property
    def facts(self) -> dict[str, FactsSuiteConfig]:
        """The suites of facts."""
        return {name: suite for name, suite in self.suites.items() if isinstance(suite, FactsSuiteConfig)}

    @property
    def mqar(self) -> dict[str, MqarSuiteConfig]:
        """The suites of associative recall."""
        return {name: suite for name, suite in self.suites.items() if isinstance(suite, MqarSuiteConfig)}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Reads an evaluation's YAML file with overrides such as `suites.passkey.n=100`.

    Raises `FileNotFoundError`, or `ConfigError` whose message starts with the path of the field.
    """
    return load_yaml(path, overrides, EvalConfig)
