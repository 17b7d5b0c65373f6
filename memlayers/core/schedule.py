"""How a text is cut into blocks, and where each token of a batch runs when rows differ in length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

LEAST_BLOCK = 128
"""Tokens that run together under a sliding window, at least: attention costs tokens × (block + window)."""


@dataclass(frozen=True)
class Schedule:
    """How memories of one model read a text. All of one model share it.

    Attributes:
        kv: what of a block's keys and values the next block sees: nothing (`drop`; its positions then begin at 0 again),
            those that a sliding window still reaches (`slide`), or all (`keep`).
        reach: text tokens that attention reaches; None: as many as in the base.
    """

    kv: Literal["drop", "slide", "keep"] = "keep"
    reach: int | None = None

    @property
    def block(self) -> int | None:
        """Tokens that run together; None: all of a call."""
        return max(self.reach, LEAST_BLOCK) if self.kv == "slide" else self.reach

    @staticmethod
    def segments(length: int) -> Schedule:
        """Segments that run apart; memory is all that passes on."""
        return Schedule("drop", length)

    @staticmethod
    def streaming(sliding_window: int | None) -> Schedule:
        """Every token as it passes, in a sliding window where one is given."""
        return WHOLE_CALL if sliding_window is None else Schedule("slide", sliding_window)


WHOLE_CALL = Schedule()
"""All tokens of a call run together, and keys and values stay: as in the base."""


@dataclass
class Plan:
    """Where each token of a batch runs: `n_segments` blocks of columns, the last one right-aligned.

    Attributes:
        n_segments: of the longest row; shorter rows start later.
        columns: (batch, tokens) column of each token; padding goes to one column past the end.
        width: columns in all.
        last_length: (batch,) tokens in each row's last segment.
    """

    n_segments: int
    columns: torch.Tensor
    width: int
    last_length: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, size: int) -> Plan:
        """For (batch, tokens) bool, False at padding, in segments of `size` tokens."""
        length = mask.sum(1)
        full = (length - 1).clamp(min=0) // size
        last_length = length - full * size
        n_full, last_width = int(full.max()), int(last_length.max())
        packed = mask.cumsum(1) - 1
        in_full = packed < (full * size)[:, None]
        early = packed + ((n_full - full) * size)[:, None]
        late = packed + (n_full * size + last_width - length)[:, None]
        width = n_full * size + last_width
        columns = torch.where(mask, torch.where(in_full, early, late), width)
        return cls(n_full + 1, columns, width, last_length)

    def arrange(self, source: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens in their columns (batch, width, hidden_size), zero where none stands, and where some do."""
        rows, _, hidden_size = source.shape
        index = self.columns[..., None].expand(-1, -1, hidden_size)
        tokens = source.new_zeros(rows, self.width + 1, hidden_size).scatter(1, index, source)
        filled = mask.new_zeros(rows, self.width + 1).scatter(1, self.columns, mask)
        return tokens[:, :-1], filled[:, :-1]

    def restore(self, hidden: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Hidden states of the last `n_tokens` tokens in their places, zero at padding."""
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
        return take(hidden, self.columns[:, -n_tokens:])


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The columns `index` (batch, n) of (batch, tokens, width)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))
