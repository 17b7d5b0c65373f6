"""How a prediction is scored: the first span of the expected type, exact; and RULER's substring score beside it."""

from __future__ import annotations

from collections.abc import Sequence

from memlayers.tasks.kinds import first_spans


def exact(prediction: str, answers: Sequence[str], kind: str) -> bool:
    """True when the first spans of `kind` (a number, a word pair, a UUID) are the answers.

    With several answers the first so many different spans must be these, in any order. Case does not count.
    """
    return sorted(first_spans(prediction, kind, len(answers))) == sorted(answer.lower() for answer in answers)


def substring(prediction: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all`: the share of answers that occur in the prediction, whatever stands around them."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)
