"""The three models of an evaluation: trained, its base, and the base with the same memory freshly initialised."""

from __future__ import annotations

import copy

import torch

import memlayers as ml
from memlayers.checkpoint import CONFIG, folder_of, place_of, read_config
from memlayers.errors import first_line
from memlayers.eval.config import EvalConfig
from memlayers.eval.plan import NO_MEMORY
from memlayers.loading import load_causal_lm, load_tokenizer

IN_MEMORY = "(in memory)"


class FromCheckpoint:
    """The models of a checkpoint, loaded when they are asked for and kept by nobody: one is in memory at a time.

    The base is the original one, also when training changed it (folder `base/` or `lora/` in the checkpoint).
    Attributes: `missing`: stages that have no model -> reason. `base_is_model`: there is no base but itself.
    Raises `FileNotFoundError` for a missing checkpoint or tokenizer.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config, self.missing = config, {}
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
            _attach_fresh(
                model, ml.parse_memory_config(block, where=f"memories.{name}"), name, self.config.seed
            )
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

    def __init__(self, model, base, seed: int) -> None:
        self._model, self._base, self.seed = model, base, seed
        self.missing = {} if ml.memories(model) else {"untrained": NO_MEMORY}
        self.base_is_model = base is None and not ml.memories(model)

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


def describe(model) -> dict[str, str]:
    """Where a model runs: device and dtype, for the report."""
    weight = model.get_input_embeddings().weight
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else str(weight.device)
    return {"device": device, "dtype": str(weight.dtype).removeprefix("torch.")}
