"""The fields of memory tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ..config import ConfigError, MemoryConfig
from ..limits import Layer, Part, Tokens, Width


class MemoryTokensConfig(MemoryConfig):
    """Tokens that carry what earlier segments said into later ones.

    Every segment runs as [read tokens ; segment ; write tokens]. What the last layer gives out at the write
    tokens becomes memory: it replaces the old (`recurrent`) or is appended to it (`accumulate`). With `prefix` there are
    no write tokens: a small recurrent network makes the memory from what the last token of the segment gives out.

    Attributes:
        n_tokens: memory tokens written per segment.
        segment_length: text tokens per segment, the reach of attention.
        mode: `recurrent` (RMT, 2207.06881), `accumulate` (AutoCompressor, 2305.14788) or `prefix` (MemoryPrompt,
            2402.15268).
        write_input: what stands at the write positions: the current `memory` (RMT section 3.2) or
            `learned` embeddings (AutoCompressor section 3.1). In accumulate mode always `learned`, in prefix mode
            nothing.
        writer_dim: width of the recurrent network in prefix mode; None: that of the model.
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
    n_tokens: Part = 16
    segment_length: Tokens = 512
    mode: Literal["recurrent", "accumulate", "prefix"] = "recurrent"
    write_input: Literal["memory", "learned"] = "memory"
    writer_dim: Width | None = None
    projection: Literal["none", "norm", "linear"] = "norm"
    write_layer: Layer = -1
    bptt_segments: Tokens | None = None
    write_while_decoding: bool = False

    @model_validator(mode="after")
    def _fits_together(self):
        if self.mode != "prefix" and self.writer_dim is not None:
            raise ConfigError(f"writer_dim: mode {self.mode!r} has no recurrent network; leave it out")
        if self.mode == "prefix" and self.write_input == "learned":
            raise ConfigError("write_input: mode 'prefix' has no tokens that write; leave it out")
        return self
