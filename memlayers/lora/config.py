"""The fields of a LoRA memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config import MemoryConfig
from ..limits import Layer, Scale, Width
from ..writing import WriterSection


class LoRAMemoryConfig(MemoryConfig):
    """A memory whose state is a LoRA adapter (2106.09685) a row: written by gradient steps, read by every token.

    Attributes:
        r: rank.
        lora_alpha: the adapter's output is multiplied by lora_alpha / r.
        target_modules: ends of the names of linear layers, as in PEFT; None: all that are in the decoder's layers.
        layers: decoder layers that are adapted; negative counts from the end. None: all.
        writer: how a text is written.
    """

    type: Literal["lora"] = "lora"
    r: Width = 16
    lora_alpha: Scale = 32.0
    target_modules: list[str] | None = Field(None, min_length=1)
    layers: list[Layer] | None = Field(None, min_length=1)
    writer: WriterSection = WriterSection()
