"""What a writer learns from: every token once, with the one before it."""

import pytest
import torch
from matrix import pad, tokens

from memlayers.writing import of_pairs, of_text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("segment_length", [1, 3, 5, 20])
def test_every_token_but_the_first_is_learned_once(segment_length, side):
    rows = [tokens(1, n, seed=n)[0] for n in (2, 6, 11)]
    ids, mask = pad(rows, side)
    segments = of_text(ids, mask.bool(), segment_length)
    for i, row in enumerate(rows):
        assert torch.equal(segments.ids[i][segments.learned[i]], row[1:])
        before = segments.ids[i][:, :-1][segments.learned[i][:, 1:]]
        assert torch.equal(before, row[:-1])
    assert (segments.learned.sum(-1) <= segment_length).all() and not segments.learned[..., 0].any()
    assert not (segments.learned & ~segments.mask).any()
    assert segments.ids.shape[1] == max(1, -(-10 // segment_length))


def test_rows_of_one_token_and_of_none():
    mask = torch.tensor([[True, True], [False, True]])
    with pytest.raises(ValueError, match="row 1 has one token"):
        of_text(tokens(2, 2), mask, 4)
    mask[1] = False
    assert not of_text(tokens(2, 2), mask, 4).mask[1].any()


class Words:
    """A tokenizer of words by their length, with a token before the text."""

    def __call__(self, text, add_special_tokens=True):
        ids = [1] * add_special_tokens + [10 + len(word) for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})


def test_pairs_learn_their_answers():
    segments = of_pairs(Words(), [[("a bb", "ccc dddd")], [("a", "bb"), ("ccc bb a", "a")]])
    assert segments.ids.shape == (2, 2, 5)
    learned = [segments.ids[i][segments.learned[i]].tolist() for i in range(2)]
    assert learned == [[13, 14], [12, 11]]
    assert segments.mask.sum((1, 2)).tolist() == [5, 8]


def test_pairs_that_cannot_be_learned():
    with pytest.raises(ValueError, match="at least one pair"):
        of_pairs(Words(), [[("a", "b")], []])
    with pytest.raises(ValueError, match="the answer '' to 'a' has no token"):
        of_pairs(Words(), [[("a", "")]])
