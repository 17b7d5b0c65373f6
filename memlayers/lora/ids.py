"""Ids of documents and names of groups: texts that look alike, because Unicode writes them in several ways, are one.

They are compared, and kept, in Unicode's form NFC. Not in NFKC, which makes one of texts that do not look alike, such as
`x²` and `x2`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

UNFIT = {
    "Cc": "a control character",
    "Cs": "half of a surrogate pair",
    "Zl": "a line break",
    "Zp": "a line break",
}
"""Unicode's categories of characters that no id may have."""


def one_form(text: str) -> str:
    """A text in the form in which ids and groups are compared."""
    return unicodedata.normalize("NFC", text)


def check_id(text: str, what: str) -> str:
    """An id in its one form.

    Raises:
        ValueError: it has characters that cannot be seen or written; `what` it is is told.
    """
    for char in text:
        if unicodedata.category(char) in UNFIT:
            raise ValueError(
                f"{what} {text!r} has {UNFIT[unicodedata.category(char)]}, {char!r}; take it out"
            )
    return one_form(text)


def by_id(texts: Mapping[str, str]) -> dict[str, str]:
    """Texts by their ids in one form.

    Raises:
        ValueError: two ids that are one, or as in `check_id`.
    """
    found: dict[str, str] = {}
    for given, text in texts.items():
        document = check_id(given, "the document id")
        if document in found:
            raise ValueError(f"two documents have the id {document!r}, written in two ways of Unicode")
        found[document] = text
    return found


def ids_of(documents: str | Sequence[str]) -> set[str]:
    """The ids of one document or several, in one form."""
    several = [documents] if isinstance(documents, str) else list(documents)
    for document in several:
        if not isinstance(document, str):
            raise TypeError(f"ids of documents are texts, got {document!r}")
    return {one_form(document) for document in several}
