"""The fields of memory tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config import MemoryConfig


class MemoryTokensConfig(MemoryConfig):
    """Tokens that carry what earlier segments said into later ones.

    Every segment runs as [read tokens ; segment ; write tokens]. The last hidden states of the write
    tokens become memory: they replace it (`recurrent`) or are appended to it (`accumulate`).

    Attributes:
        n_tokens: memory tokens written per segment.
        segment_length: text tokens per segment, the reach of attention.
        mode: `recurrent` (RMT, 2207.06881) or `accumulate` (AutoCompressor, 2305.14788).
        write_input: what stands at the write positions: the current `memory` (RMT section 3.2) or
            `learned` embeddings (AutoCompressor section 3.1). In accumulate mode always `learned`.
        projection: map from written hidden states to memory: `none`, `norm` (RMSNorm with a learned scale,
            so that memory has the size of an embedding) or `linear` (the norm and a matrix that starts at 1).
        write_layer: decoder layer whose output at the write positions becomes memory, negative from the end;
            None for the model's last hidden states (RMT).
        bptt_segments: back-propagate through at most this many segments; None for all of a call.
        write_while_decoding: also write the tokens that `generate` produces, a segment at a time.
    """

    type: Literal["tokens"] = "tokens"
    n_tokens: int = Field(16, ge=1)
    segment_length: int = Field(512, ge=1)
    mode: Literal["recurrent", "accumulate"] = "recurrent"
    write_input: Literal["memory", "learned"] = "memory"
    projection: Literal["none", "norm", "linear"] = "norm"
    write_layer: int | None = None
    bptt_segments: int | None = Field(None, ge=1)
    write_while_decoding: bool = False
