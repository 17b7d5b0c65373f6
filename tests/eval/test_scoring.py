"""Scoring: the first span of the type, exact; RULER's substring score."""

from __future__ import annotations

import pytest

from memlayers.eval.scoring import exact, substring

UUID = "0f1e2d3c-4b5a-4697-8879-6a5b4c3d2e1f"


@pytest.mark.parametrize(
    ("prediction", "answers", "kind", "right"),
    [
        (" 12345. The", ["12345"], "number", True),
        ("It is 12345", ["12345"], "number", True),
        (" 123456", ["12345"], "number", False),
        (" 99 12345", ["12345"], "number", False),
        ("", ["12345"], "number", False),
        (" Brave-Otter.", ["brave-otter"], "word", True),
        (" brave-otters", ["brave-otter"], "word", False),
        (f" {UUID.upper()}.", [UUID], "uuid", True),
        (f" {UUID[:-1]}0", [UUID], "uuid", False),
        (" 2, 1 and 3", ["1", "2"], "number", True),
        (" 1, 1, 2", ["1", "2"], "number", True),
        (" 1, 3, 2", ["1", "2"], "number", False),
        (" 1", ["1", "2"], "number", False),
    ],
)
def test_exact(prediction, answers, kind, right):
    assert exact(prediction, answers, kind) is right


def test_substring_is_the_mean_share():
    assert substring("99 12345 and more", ["12345"]) == 1.0
    assert substring("1111 2222", ["1111", "3333"]) == 0.5
    assert substring("ABC-DEF", ["abc-def"]) == 1.0
    assert substring("", ["1"]) == 0.0
