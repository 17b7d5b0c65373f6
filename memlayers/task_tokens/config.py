"""The fields of task tokens."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from ..config import ConfigError, MemoryConfig


class TaskTokensConfig(MemoryConfig):
    """New words of the vocabulary, one a procedure: read, a word calls its procedure; predicted, it routes to it.

    Attributes:
        names: the procedures. The first has the id after the base's last, and so on; null is a free place, left by a
            procedure that was removed, so that those behind it keep their ids.
        tied: one row both for reading and for predicting a word; false gives it two. None: as the base does it.
        train: procedures whose rows learn; the others stay bit for bit. None: all.
        renormalize: after each step of an optimizer, put the rows that learn back to the mean norm of the base's
            rows (`memlayers.train` does it; elsewhere see `TaskTokens.renormalize_`).
        init_from: name -> text that says what it does, whose tokens' mean its row starts from (`memlayers.train` does
            it where it attaches the memory; elsewhere see `TaskTokens.start_from_texts_`).
    """

    type: Literal["task_tokens"] = "task_tokens"
    names: list[str | None] = Field(default_factory=list)
    tied: bool | None = None
    train: list[str] | None = None
    renormalize: bool = False
    init_from: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self):
        present = Counter(name for name in self.names if name is not None)
        for name, count in present.items():
            if not name.strip():
                raise ConfigError(f"names: {name!r} is no name; give a procedure at least one letter")
            if count > 1:
                raise ConfigError(f"names: {name!r} is there {count} times; every procedure has its own name")
        for field in ("train", "init_from"):
            for name in getattr(self, field) or []:
                if name not in present:
                    raise ConfigError(f"{field}: {name!r} is not among names, {list(present)}")
        return self
