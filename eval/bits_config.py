"""What `memlayers.eval.bits` measures."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.eval.reversible import CycleTraining
from memlayers.kinds import AnyMemoryConfig
from memlayers.limits import Rate, Seed, Steps, Tokens, Width


class Ladder(Strict):
    """One kind of memory in several sizes.

    Attributes:
        memory: all its other fields. The `ratios` of a reversible memory follow from the text, which is one segment.
        field: the field that sizes set; `names` takes as many names.
        sizes: its values.
        lengths: tokens of a text, one after the other; the most bits count.
        learning_rate: of AdamW.
        read_back: count what a reversible memory itself gives back, after this training of its compressor on other
            random texts; None: what the base predicts.
    """

    memory: AnyMemoryConfig
    field: str
    sizes: list[Width] = Field(min_length=1)
    lengths: list[Tokens] = Field([64, 256], min_length=1)
    learning_rate: Rate = 1e-2
    read_back: CycleTraining | None = None

    @model_validator(mode="after")
    def _fits_together(self):
        for field in ("sizes", "lengths"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ConfigError(f"{field}: {values} names a value twice")
        if self.read_back is not None and self.memory.type != "reversible":
            raise ConfigError(
                f"read_back: only a reversible memory gives text back, not {self.memory.type!r}"
            )
        for size in self.sizes:
            self.of_size(size, self.lengths[0])
        return self

    def of_size(self, size: int, length: int) -> ml.MemoryConfig:
        """The memory of this size for a text of `length` tokens. Raises `ConfigError` where its kind does not take it."""
        fields = self.memory.model_dump()
        fields[self.field] = [f"task{i}" for i in range(size)] if self.field == "names" else size
        if self.memory.type == "reversible":
            fields["ratios"] = [math.ceil(length / fields["n_tokens"])]
        return ml.parse_memory_config(fields)


class BitsConfig(Strict):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint, frozen.
        steps: of AdamW on what a memory keeps for the text.
        kinds: name in the report to the kind and its sizes.
        seeds: of texts and of the memories' starts.
        note: for the report, how the settings were chosen.
    """

    model: str
    steps: Steps = 400
    kinds: dict[str, Ladder] = Field(min_length=1)
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _seeds_once(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} names a value twice")
        return self
