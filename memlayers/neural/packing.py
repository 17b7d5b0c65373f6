"""Rows with padding anywhere, and rows at different places of a chunk, as `chunk_memory` wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Each row's real tokens one after another, without the pads between them.

    Columns are places in chunks, the same for every row, so a row that is further in its open chunk than another
    starts in a later column. Where no row leaves its open chunk places do not matter and every row starts in
    column 0; a decoding step of rows of different length then has one column.

    Attributes:
        first: tokens that fit before the first end of a chunk.
        start: (B,) int64, column of each row's first token.
        end: (B,) int64, the column after its last one.
        source: (B, W) int64, the token that stands in a column; any where `active` is False.
        active: (B, W) bool, a token stands there.
        target: (B, T) int64, the column in which a token stands; any at a pad.
        mask: (B, T) bool, False at pads.
    """

    first: int
    start: torch.Tensor
    end: torch.Tensor
    source: torch.Tensor
    active: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) tokens → (B, W, width), 0 where no token stands."""
        packed = x.gather(1, self.source[..., None].expand(-1, -1, x.shape[-1]))
        return packed.masked_fill(~self.active[..., None], 0)

    def unpack(self, y: torch.Tensor) -> torch.Tensor:
        """(B, W, width) → (B, T, width), 0 at pads."""
        placed = y.gather(1, self.target[..., None].expand(-1, -1, y.shape[-1]))
        return placed.masked_fill(~self.mask[..., None], 0)


def plan(mask: torch.Tensor, places: list[int], counts: list[int], chunk_size: int) -> Packing:
    """Where the tokens of a batch go.

    Args:
        mask: (B, T) bool, False at pads; at least one is True.
        places: each row's place in its open chunk, 0 to chunk_size - 1.
        counts: each row's number of real tokens.
    """
    rows = [(place, count) for place, count in zip(places, counts) if count]
    stay = all(place + count <= chunk_size for place, count in rows)
    lowest = min(place for place, _ in rows)
    starts = [0 if stay else max(place - lowest, 0) for place in places]
    width = max(start + count for start, count in zip(starts, counts) if count)

    start = torch.tensor(starts, device=mask.device)
    order = mask.cumsum(1)
    target = (start[:, None] + order - 1).clamp(0, width - 1)
    spare = torch.where(mask, target, width)  # pads share a column behind the last, which is cut off
    source = target.new_zeros(len(mask), width + 1).scatter(1, spare, _counting(mask))
    active = mask.new_zeros(len(mask), width + 1).scatter(1, spare, mask)
    return Packing(
        first=chunk_size if stay else chunk_size - lowest,
        start=start,
        end=start + order[:, -1],
        source=source[:, :-1],
        active=active[:, :-1],
        target=target,
        mask=mask,
    )


def _counting(mask: torch.Tensor) -> torch.Tensor:
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
