"""The fields of a reversible memory."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from ..config import ConfigError, MemoryConfig
from ..limits import MOST_TOKENS, Part, Tokens

MOST_PLACES = 4096
"""Of a level: each coupling keeps a number for every two of them, and compares them all."""


class ReversibleMemoryConfig(MemoryConfig):
    """Memory tokens that an invertible network makes of the text itself, and that later segments read.

    Attributes:
        n_tokens: memory tokens that a segment becomes, and those that a span becomes at every level.
        ratios: levels from the text up (document, paragraph, entity in the paper; here equal spans). At each, spans of
            n_tokens · ratio vectors become n_tokens. A segment has n_tokens · the product of all ratios text tokens.
        depth: couplings of a level; a single one would read half of the width only.
        heads: of their attention; the first `ratio` of them begin with a place of its own each, see `first_route`.
        expansion: of their MLP.
        backwards: how text is read back: by the `inverse` of the same couplings, or, for comparison, by couplings of
            its own: the second half of `depth`, while the first half compresses (`separate`).
        bptt_segments: back-propagate through at most this many segments; None for all of a call.
        write_while_decoding: also write the tokens that `generate` produces, a segment at a time.
    """

    type: Literal["reversible"] = "reversible"
    n_tokens: Part = 4
    ratios: list[Part] = Field([8], min_length=1, max_length=16)
    depth: int = Field(4, ge=2, le=64)
    heads: Part = 8
    expansion: Part = 4
    backwards: Literal["inverse", "separate"] = "inverse"
    bptt_segments: Tokens | None = None
    write_while_decoding: bool = False

    @model_validator(mode="after")
    def _fits_together(self):
        if self.backwards == "separate" and self.depth % 2:
            raise ConfigError(f"depth: {self.depth} couplings have no halves; backwards 'separate' needs two")
        for i, ratio in enumerate(self.ratios):
            if self.n_tokens * (ratio + 1) > MOST_PLACES:
                raise ConfigError(
                    f"ratios.{i}: {self.n_tokens} tokens for {ratio} times as many are {self.n_tokens * (ratio + 1):,} places "
                    f"that attend to each other, at most {MOST_PLACES:,} are taken; add a level in its place"
                )
        if self.segment_length > MOST_TOKENS:
            raise ConfigError(
                f"ratios: with {self.n_tokens} tokens they make a segment of {self.segment_length:,} text tokens, at most "
                f"{MOST_TOKENS:,} are taken"
            )
        return self

    @property
    def segment_length(self) -> int:
        """Text tokens of a segment."""
        return self.n_tokens * math.prod(self.ratios)
