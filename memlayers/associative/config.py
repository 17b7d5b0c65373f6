"""The fields of an associative memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config import MemoryConfig
from ..limits import Layer, Part, Tokens


class AssociativeMemoryConfig(MemoryConfig):
    """A matrix a layer, written by tokens behind each segment and read by all tokens of the next ones.

    Attributes:
        n_tokens: tokens behind a segment that write; learned embeddings, the same behind every segment.
        segment_length: text tokens per segment, the reach of attention.
        layers: decoder layers that have a matrix; negative counts from the end. None: all.
        key_dim: width of keys and queries before their features. What is read is a mean over the keys that a query
            touches at all, so that few features make it jump.
        nu: order of the features, DPFP-ν (2102.11174): 2 · nu · key_dim of them.
        normalize: divide what is read by how much of the query's features was written, as ARMT does. False: the plain
            delta rule, for which a key that is written again with strength 1 gives exactly its new value.
        correction: count a key that is there already only as far as it is new, in what reading divides by.
        bptt_segments: back-propagate through at most this many segments; None for all of a call.
        write_while_decoding: also write the tokens that `generate` produces, a segment at a time.
    """

    type: Literal["associative"] = "associative"
    n_tokens: int = Field(16, ge=1, le=256)
    segment_length: Tokens = 512
    layers: list[Layer] | None = Field(None, min_length=1)
    key_dim: Part = 64
    nu: int = Field(3, ge=1, le=16)
    normalize: bool = True
    correction: bool = True
    bptt_segments: Tokens | None = None
    write_while_decoding: bool = False

    @property
    def n_features(self) -> int:
        """Rows of the matrix."""
        return 2 * self.nu * self.key_dim
