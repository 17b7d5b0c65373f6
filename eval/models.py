"""The three models that are measured beside each other: trained, its base, and the base with the same memory untrained."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field

import memlayers as ml
from memlayers.checkpoint import CONFIG, folder_of, place_of, read_config
from memlayers.config import ConfigError
from memlayers.core.model import max_positions
from memlayers.errors import first_line
from memlayers.eval.experiment import ExperimentConfig, Progress, Record, Unique
from memlayers.limits import MOST_TOKENS, Count, Seed, Tokens
from memlayers.loading import load_causal_lm, load_tokenizer

IN_MEMORY = "(in memory)"
NO_MEMORY = "this model has no memory"
STAGES = ("trained", "base", "untrained")
ARMS = ("base", "base_truncated", "memory_disabled", "untrained", "trained")
CONTROLS = ("no_needle", "shuffled_memory", "zeroed_memory", "question_only")
Arm = Literal["base", "base_truncated", "memory_disabled", "untrained", "trained"]
Control = Literal["no_needle", "shuffled_memory", "zeroed_memory", "question_only"]


class ModelConfig(ExperimentConfig):
    """What the experiments on a trained model share.

    Attributes:
        model: folder or hub id of a wrapped checkpoint (`memlayers.save`) or of a plain one.
        base: the checkpoint of the base arms; default: the one recorded in the wrapped checkpoint, that is the original
            one, also when the base was trained along.
        tokenizer: default: the model's, else the base's.
        arms: models to measure.
        window: tokens of the truncated arms; default: the tokens that attention can reach in the wrapped model.
        batch_size: rows of a batch.
        margin: tokens generated past the answer's length.
    """

    model: str
    base: str | None = None
    tokenizer: str | None = None
    arms: Annotated[list[Arm], Unique] = Field(list(ARMS))
    window: Tokens | None = None
    batch_size: Count = 64
    margin: int = Field(4, ge=0, le=MOST_TOKENS)
    seeds: Annotated[list[Seed], Unique] = Field([0], min_length=1)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class FromCheckpoint:
    """The models of a checkpoint, loaded when they are asked for and kept by nobody.

    The base is the original one, also when training changed it (folder `base/` or `lora/` in the checkpoint).
    Attributes: `missing`: stages that have no model -> reason. `base_is_model`: there is no base but itself.
    Raises `FileNotFoundError` for a missing checkpoint or tokenizer.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed, self.missing = config, seed, {}
        self.folder = folder_of(config.model)
        self.wrapped = (self.folder / CONFIG).is_file()
        self.base_is_model = not self.wrapped and config.base is None
        self.base_name = config.base or (self._original() if self.wrapped else config.model)
        if not self.base_name:
            reason = f"{config.model} names no original base: give base= with its folder or hub id"
            self.missing = {"base": reason, "untrained": reason}
        if not self.wrapped:
            self.missing["untrained"] = NO_MEMORY

    def tokenizer(self):
        """The tokenizer named in the config, else the checkpoint's own, else its base's."""
        own = [self.folder, self.folder / "base", *filter(None, [self.base_name])]
        names = [self.config.tokenizer] if self.config.tokenizer else own
        for name in names:
            try:
                return load_tokenizer(name)
            except (OSError, ValueError, TypeError):
                continue
        tried = ", ".join(repr(str(name)) for name in names)
        raise FileNotFoundError(
            f"no tokenizer in {tried}: give tokenizer= with a folder or hub id that has one."
        )

    def trained(self):
        if not self.wrapped:
            return self._plain(self.config.model)
        own_base = (self.folder / "base").is_dir() or self.config.base is None
        base = None if own_base else self.config.base
        return self._place(ml.load(self.folder, base=base, dtype=self.config.dtype or "auto"))

    def base(self):
        return self._plain(self.base_name)

    def untrained(self):
        model = self.base()
        for name, block in read_config(self.folder)["memories"].items():
            _attach_fresh(model, ml.parse_memory_config(block, where=f"memories.{name}"), name, self.seed)
        return self._place(model)

    def _original(self) -> str | None:
        recorded = read_config(self.folder)["base"]
        trained = (self.folder / "base").is_dir()
        return place_of(self.folder, recorded.get("trained_from" if trained else "name_or_path"))

    def _plain(self, name: str):
        return self._place(load_plain(name, self.config.dtype or "auto"))

    def _place(self, model):
        return model.to(self.config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


class InMemory:
    """The models around one that is already there. `base`: the plain original; default: `model` without its memory.

    Nothing of `model` or `base` changes: fresh memory goes onto a copy.
    """

    def __init__(self, model, tokenizer, base, seed: int) -> None:
        self._model, self._tokenizer, self._base, self.seed = model, tokenizer, base, seed
        self.missing = {} if ml.memories(model) else {"untrained": NO_MEMORY}
        self.base_is_model = base is None and not ml.memories(model)

    def tokenizer(self):
        """The tokenizer of all three."""
        return self._tokenizer

    def trained(self):
        return self._model

    def base(self):
        if self._base is None:
            self._base = copy.deepcopy(self._model)
            if ml.memories(self._base):
                ml.detach(self._base)
        return self._base

    def untrained(self):
        model = copy.deepcopy(self.base())
        for name, memory in ml.memories(self._model).items():
            _attach_fresh(model, memory.config, name, self.seed)
        return model


def load_plain(name: str, dtype: str = "auto"):
    """The causal LM at `name`, a folder or hub id. Raises `FileNotFoundError` where it cannot be loaded."""
    try:
        return load_causal_lm(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the checkpoint {str(name)!r} cannot be loaded ({first_line(error)}); name it with model=, "
            "or base= for the base of a wrapped one."
        ) from None


def _attach_fresh(model, config, name: str, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ml.attach(model, config, name=name)


def from_checkpoint(measure: Callable[..., Iterator[Record]]):
    """`run(config, seed, progress)` of an experiment whose `measure` takes the models of a checkpoint."""

    def run(config: ModelConfig, seed: int, progress: Progress) -> Iterator[Record]:
        yield from measure(config, FromCheckpoint(config, seed), seed, progress)

    return run


def stages(models, wanted=STAGES, trained=None) -> Iterator[tuple[str, object]]:
    """(stage, model) of the models that there are, one after the other, so that one is in memory at a time.

    trained: the trained model where it is loaded already.
    """
    for stage in STAGES:
        if stage in models.missing or stage not in wanted:
            continue
        model = trained if stage == "trained" and trained is not None else getattr(models, stage)()
        trained = None
        yield stage, model
        del model
        gc.collect()


def window_of(config: ModelConfig, model) -> int:
    """Tokens of the truncated arms. Raises `ConfigError` where no window is known, or it is past the positions."""
    window, positions = config.window or ml.window(model), max_positions(model)
    if not window:
        raise ConfigError(
            "window: the model's config names no limit of positions; give the window of the truncated arms"
        )
    if positions is not None and window > positions:
        raise ConfigError(f"window: {window} tokens are more than the model's {positions} positions.")
    return window
