"""The fields of a cartridge."""

from __future__ import annotations

from typing import Literal

from ..config import MemoryConfig
from ..limits import Width
from ..writing import WriterSection


class CartridgeConfig(MemoryConfig):
    """Keys and values of some places before the text, in every layer; all tokens attend to them.

    Attributes:
        n_tokens: places.
        start: what a row has before anything is written. `learned`: parameters, as in prefix tuning (2101.00190).
            `prompt`: keys and values of learned vectors that run through the layers as tokens do, as in prompt tuning
            (2104.08691). `text`: nothing; then the keys and values of the first `n_tokens` tokens of the text that is
            written first.
        writer: how what stands there is refined on a text; `steps: 0` leaves it, the same for all texts.
    """

    type: Literal["cartridge"] = "cartridge"
    n_tokens: Width = 64
    start: Literal["learned", "prompt", "text"] = "text"
    writer: WriterSection = WriterSection()
