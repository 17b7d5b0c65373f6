"""The fields of memory tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config import MemoryConfig


class MemoryTokensConfig(MemoryConfig):
    """Tokens that carry what earlier segments said into later ones.

    Every segment runs as [read tokens ; segment ; write tokens]. What the last layer gives out at the write
    tokens becomes memory: it replaces the old (`recurrent`) or is appended to it (`accumulate`).

    Attributes:
        n_tokens: memory tokens written per segment.
        segment_length: text tokens per segment, the reach of attention.
        mode: `recurrent` (RMT, 2207.06881) or `accumulate` (AutoCompressor, 2305.14788).
        write_input: what stands at the write positions: the current `memory` (RMT section 3.2) or
            `learned` embeddings (AutoCompressor section 3.1). In accumulate mode always `learned`.
        projection: map from what was written to memory: `none`, `norm` (RMSNorm with a learned scale; keeps
            memory at one size over any number of segments) or `linear` (the norm and a matrix that starts
            at 1).
        write_layer: decoder layer whose output at the write positions becomes memory; negative counts from
            the end. The output is taken before the model's final norm, whose weights would turn memory a
            little with every segment.
        bptt_segments: back-propagate through at most this many segments; None for all of a call.
        write_while_decoding: also write the tokens that `generate` produces, a segment at a time.
    """

    type: Literal["tokens"] = "tokens"
    n_tokens: int = Field(16, ge=1)
    segment_length: int = Field(512, ge=1)
    mode: Literal["recurrent", "accumulate"] = "recurrent"
    write_input: Literal["memory", "learned"] = "memory"
    projection: Literal["none", "norm", "linear"] = "norm"
    write_layer: int = -1
    bptt_segments: int | None = Field(None, ge=1)
    write_while_decoding: bool = False
