"""The names of procedures in a tokenizer: special tokens with the ids of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_of(name: str) -> str:
    """How a procedure is written in a text."""
    return f"<|{name}|>"


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, first_id: int, names: list[str | None]) -> None:
    """Give the tokens of `names` the ids from `first_id` on, in place; None is a place without a name.

    A tokenizer gives a new token the id after its last one and no other. So where the base's embedding has more rows
    than the tokenizer has tokens, and at places without a name, it gets reserved tokens that stand for no word.
    What it already has at the right id stays.

    Raises:
        ValueError: a token exists under another id; an id is taken by another token, so there is no room; the ids
            have holes. The tokenizer is then as it was.
    """
    vocabulary = tokenizer.get_vocab()
    taken = {index: token for token, index in vocabulary.items()}
    wanted = {first_id + place: name for place, name in enumerate(names)}
    for index, name in wanted.items():
        token = None if name is None else token_of(name)
        if token is not None and vocabulary.get(token, index) != index:
            raise ValueError(
                f"the tokenizer has a token {token!r} already, with id {vocabulary[token]} and not {index}; give the "
                "procedure another name, or take the base's own tokenizer"
            )
        if token is not None and taken.get(index, token) != token:
            raise ValueError(
                f"the tokenizer has no room for {token!r}: its id {index} is {taken[index]!r}, and the ids from "
                f"{first_id} on, behind the rows of the base, belong to procedures; take the base's own tokenizer"
            )
    if len(vocabulary) != max(taken) + 1:
        raise ValueError(
            f"the tokenizer has no room: it has {len(vocabulary)} tokens, but ids up to {max(taken)}. New tokens would "
            "get ids in the holes; fill the holes first"
        )
    new = []
    for index in range(len(vocabulary), first_id + len(names)):
        name = wanted.get(index)
        text = f"<|reserved_{index}|>" if name is None else token_of(name)
        new.append(AddedToken(text, special=True, normalized=False))
    tokenizer.add_tokens(new, special_tokens=True)
