"""The fields of a bank of LoRA shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config import Strict
from ..limits import Count, Rate, Scale, Seed, Tokens


class LoRABankConfig(Strict):
    """How the shards of a bank are trained and found; one config for all shards of a bank, fixed when it is made.

    Attributes:
        steps: gradient steps of the training of a shard.
        learning_rate: of AdamW, without decay of weights.
        batch_size: segments that a step reads together.
        segment_length: tokens that a segment predicts.
        seed: of every shard's start and order of segments, together with its name.
        router: where the model's own vectors of texts come from, as means over tokens: its `input` embeddings, or the
            hidden states of its last layer with all memories off, its `output`.
        router_length: tokens that one vector of a document stands for.
        temperature: the shards that are mixed weigh as the softmax of their scores / temperature.
    """

    steps: int = Field(100, ge=0, le=1_000_000)
    learning_rate: Rate = 5e-3
    batch_size: Count = 8
    segment_length: Tokens = 128
    seed: Seed = 0
    router: Literal["input", "output"] = "input"
    router_length: Tokens = 32
    temperature: Scale = 0.01
