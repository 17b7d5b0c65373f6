"""Tokens laid out in chunks: runs of chunks, tokens that are not active, the halo of a window, and cuts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def runs(n_tokens: int, chunk_size: int, first: int) -> Iterator[tuple[int, int, int, bool]]:
    """Up to three runs of equal chunks: the rest of the open chunk, all whole chunks, what remains.

    Each as start, stop, the length of its chunks, and whether the last of them is at its end.
    """
    start = 0
    if first < chunk_size:
        start = min(first, n_tokens)
        yield 0, start, start, start == first
    whole = (n_tokens - start) // chunk_size * chunk_size
    if whole:
        yield start, start + whole, chunk_size, True
    if start + whole < n_tokens:
        yield start + whole, n_tokens, n_tokens - start - whole, False


def silence(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor | None], inactive: Tensor):
    """Gates (theta, eta, alpha) at which a token changes nothing, zeros in its streams. inactive: (B, 1, T)."""
    q, k, v = (x.masked_fill(inactive[..., None], 0) for x in (q, k, v))
    gates = [None if gate is None else gate.masked_fill(inactive, at) for gate, at in zip(gates, (0, 1, 0))]
    return q, k, v, gates


def with_halo(k: Tensor, v: Tensor, halo: tuple[Tensor, ...], active: Tensor | None):
    """k and v with the halo in front, (B, H, window − 1 + T, width), and the halo after the last token.

    Where a row's active columns start later, its halo stands right before them, and zeros before that.
    """
    n = halo[0].shape[2]
    k, v = torch.cat((halo[0], k), 2), torch.cat((halo[1], v), 2)
    if active is None:
        return k, v, (k[:, :, -n:], v[:, :, -n:])
    start = active.int().argmax(1, keepdim=True)
    end = start + active.sum(1, keepdim=True)
    place = torch.arange(k.shape[2], device=k.device)
    origin = torch.where(place < start + n, (place - start).clamp(min=0), place)
    empty = (place < start) | (place >= end + n)
    k, v = (take(x, origin).masked_fill(empty[:, None, :, None], 0) for x in (k, v))
    return k, v, tuple(take(x, end + place[:n]) for x in (k, v))


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens index (B, n) of x (B, H, T, width), row by row."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def cut(x: Tensor, chunks: range, length: int, extra: int, dtype: torch.dtype) -> Tensor:
    """Some chunks of a stream (B, H, extra + T, width) as (g, B H, extra + length, width), of a gate likewise.

    Each chunk has the `extra` tokens before it in front.
    """
    pieces = x[:, :, chunks.start * length : chunks.stop * length + extra].unfold(2, length + extra, length)
    pieces = pieces.mT if x.dim() == 4 else pieces
    return pieces.movedim(2, 0).to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)


def paste(x: Tensor, pieces: Tensor, chunks: range, length: int, extra: int = 0) -> None:
    """The reverse of `cut`: writes pieces (g, B H, extra + length, ...) into x; adds them up if they overlap."""
    pieces = pieces.unflatten(1, x.shape[:2])
    if extra == 0:
        whole = x[:, :, chunks.start * length : chunks.stop * length]
        whole.unflatten(2, (len(chunks), length)).copy_(pieces.movedim(0, 2))
        return
    for p, piece in zip(chunks, pieces):
        x[:, :, p * length : (p + 1) * length + extra] += piece
