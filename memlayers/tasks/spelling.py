"""Text to token ids, piece by piece, so that the pieces can be put together without tokenizing again.

A haystack is made of sentences tokenized once. For that each sentence must get the ids it would get in the
middle of a text: SentencePiece tokenizers put a space before the first word of every text, so a sentence is
tokenized behind an anchor ("." or a word), and the anchor's ids are taken off.
"""

from __future__ import annotations

from collections.abc import Iterable

ANCHORS = (".", "a", ",", "\n")


class Speller:
    """A tokenizer seen as `text -> ids` for pieces of a text. No special tokens are ever added by it.

    Attributes: `bos`: the ids a context starts with (`[bos_token_id]` if the tokenizer adds one by default,
    else `[]`).
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if getattr(tokenizer, "is_fast", False) else None
        self._anchor, self._anchor_ids = self._choose_anchor()
        with_special = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and with_special[:1] == [bos] else []

    def ids(self, piece: str) -> list[int]:
        """Ids of `piece` as it stands behind other text. `piece` usually starts with a space."""
        return self._encode(self._anchor + piece)[len(self._anchor_ids) :]

    def ids_many(self, pieces: Iterable[str]) -> list[list[int]]:
        """`ids` of each piece, in one call to the tokenizer where it is a fast one."""
        texts = [self._anchor + piece for piece in pieces]
        if self._backend is None:
            encoded = [self._encode(text) for text in texts]
        else:
            encoded = [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]
        return [ids[len(self._anchor_ids) :] for ids in encoded]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def knows(self, ids: list[int]) -> bool:
        """False where the tokenizer's unknown token is in `ids`."""
        return self.tokenizer.unk_token_id is None or self.tokenizer.unk_token_id not in ids

    def check(self, piece: str, exact: bool = False) -> None:
        """Raises `ValueError` if the tokenizer cannot spell `piece`: unknown tokens, or characters lost.

        `exact` also wants the spaces inside the piece back (an answer must be readable from the generated
        ids).
        """
        ids = self.ids(piece)
        back = self.decode(ids)
        same = back.strip() == piece.strip() if exact else "".join(back.split()) == "".join(piece.split())
        if not self.knows(ids) or not same:
            raise ValueError(
                f"the tokenizer {self.name!r} cannot spell the needle {piece!r}: it reads back as {back!r}. "
                "Choose another kind of key, other templates, or a tokenizer that has these characters."
            )

    def _encode(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _choose_anchor(self) -> tuple[str, list[int]]:
        for anchor in ANCHORS:
            alone = self._encode(anchor)
            if alone and all(
                self._encode(anchor + tail)[: len(alone)] == alone for tail in (" The", " is", " 1")
            ):
                return anchor, alone
        return "", []
