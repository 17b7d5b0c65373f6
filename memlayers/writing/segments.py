"""What a writer learns from: texts cut into segments, or pairs of questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..core.masks import padding_first, padding_last

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segments(NamedTuple):
    """A batch of texts, each in segments, padded on the right.

    Attributes:
        ids: (batch, segments, tokens) int64.
        mask: (batch, segments, tokens) bool, False at padding.
        learned: (batch, segments, tokens) bool, tokens that are predicted. Never the first of a segment.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    learned: torch.Tensor

    def one_by_one(self) -> list[Segments]:
        """Each segment of all rows by itself."""
        return [Segments(*(x[:, i : i + 1] for x in self)) for i in range(self.ids.shape[1])]


def of_text(input_ids: torch.Tensor, mask: torch.Tensor, segment_length: int) -> Segments:
    """Cut (batch, tokens) into segments. Each predicts `segment_length` tokens and stands on the one before them.

    Args:
        mask: (batch, tokens) bool, False at padding, which may stand anywhere.

    Raises:
        ValueError: a row of one token, from which nothing can be predicted.
    """
    lengths = mask.sum(1)
    short = (lengths == 1).nonzero().flatten().tolist()
    if short:
        raise ValueError(
            f"row {short[0]} has one token; a LoRA memory learns to predict the next, so write two at least"
        )
    order = padding_last(mask)
    packed = input_ids.gather(1, order)
    n_segments = max(1, -(-(int(lengths.max()) - 1) // segment_length))
    width = min(segment_length, max(int(lengths.max()) - 1, 1)) + 1
    place = segment_length * torch.arange(n_segments, device=mask.device)[:, None]
    place = place + torch.arange(width, device=mask.device)
    real = place < lengths[:, None, None]
    ids = packed[:, place.clamp(max=packed.shape[1] - 1)]
    learned = real.clone()
    learned[..., 0] = False
    real = real & (
        learned.any(-1, keepdim=True)
    )  # a segment that has nothing but the last token of the one before
    return Segments(ids, real, learned)


def right_aligned(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (batch, tokens) with their padding, wherever it stands, in front; and their mask."""
    order = padding_first(mask)
    return input_ids.gather(1, order), mask.gather(1, order)


def of_pairs(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[tuple[str, str]]]) -> Segments:
    """Pairs of a question and its answer, a segment each: the answer's tokens are learned.

    Args:
        rows: for each row of the batch, its pairs.

    Raises:
        ValueError: no pairs, or a pair whose answer has no token.
    """
    if not rows or not all(rows):
        raise ValueError("every row needs at least one pair of question and answer")
    encoded = [[_pair(tokenizer, *pair) for pair in row] for row in rows]
    n_segments, width = max(map(len, encoded)), max(len(ids) for row in encoded for ids, _ in row)
    ids = torch.zeros(len(rows), n_segments, width, dtype=torch.int64)
    mask, learned = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(encoded):
        for j, (tokens, n_asked) in enumerate(row):
            ids[i, j, : len(tokens)] = torch.tensor(tokens)
            mask[i, j, : len(tokens)] = True
            learned[i, j, max(n_asked, 1) : len(tokens)] = True
    return Segments(ids, mask, learned)


def _pair(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], int]:
    asked = tokenizer(question).input_ids
    answered = tokenizer(answer, add_special_tokens=False).input_ids
    if not answered:
        raise ValueError(f"the answer {answer!r} to {question!r} has no token")
    return asked + answered, len(asked)
