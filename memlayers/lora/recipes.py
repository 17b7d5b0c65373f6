"""What the shards of a bank are made from: new ones, updated ones, and those from which a document goes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from .ids import by_id
from .index import BankIndex, sha256
from .shard import ShardManifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Recipe(NamedTuple):
    """What a shard is made from; the rest follows from the bank's config and the model. Fields as in the manifest."""

    name: str
    group: str
    texts: Mapping[str, str]
    created: str
    version: int = 1
    updated: Mapping[str, list[int]] = {}
    parent: str | None = None


def again(manifest: ShardManifest, texts: Mapping[str, str]) -> Recipe:
    """A shard as it is; `texts` are all of its documents."""
    return Recipe(
        name=manifest.name,
        group=manifest.group,
        texts=texts,
        created=manifest.created,
        version=manifest.version,
        updated=manifest.updated,
        parent=manifest.parent,
    )


def updated(manifest: ShardManifest, texts: Mapping[str, str], new: Mapping[str, str]) -> Recipe:
    """A shard whose `texts` are replaced by those of `new` that it holds: the next version, with a parent.

    A document of `new` need not be in `texts`, where its old text was damaged.
    """
    version = manifest.version + 1
    changed = {document: new[document] for document in manifest.documents if document in new}
    history = {document: [*manifest.updated.get(document, []), version] for document in changed}
    return Recipe(
        name=manifest.name,
        group=manifest.group,
        texts={**texts, **changed},
        created=manifest.created,
        version=version,
        updated={**manifest.updated, **history},
        parent=manifest.adapter,
    )


def without(manifest: ShardManifest, texts: Mapping[str, str], gone: Collection[str]) -> Recipe | None:
    """A shard as if it had never held the documents `gone`, nor those that are not in `texts`; None where it holds no
    others.

    Updates of nothing but documents that are gone are not counted in its version. It has no parent: the adapter of the
    version before would have to be trained on texts that are not there any more.
    """
    left = {document: text for document, text in texts.items() if document not in gone}
    if not left:
        return None
    history = {document: versions for document, versions in manifest.updated.items() if document in left}
    counted = sorted({version for versions in history.values() for version in versions})
    number = {version: i for i, version in enumerate(counted, start=2)}
    unnamed = manifest.name == own_name(manifest.group, manifest.documents)
    return Recipe(
        name=own_name(manifest.group, left) if unnamed else manifest.name,
        group=manifest.group,
        texts=left,
        created=manifest.created,
        version=1 + len(counted),
        updated={document: [number[v] for v in versions] for document, versions in history.items()},
    )


def own_name(group: str, documents: Iterable[str]) -> str:
    """The name of a shard that was given none."""
    return f"shard-{sha256(repr((group, sorted(documents))))[:12]}"


def check_texts(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str]) -> dict[str, str]:
    """The texts by their ids in one form (`ids.py`); raises TypeError or ValueError unless each has an id that can be
    one and two tokens at least."""
    if not texts:
        raise ValueError("no documents were given")
    for document, text in texts.items():
        if not isinstance(document, str) or not document or not isinstance(text, str):
            raise TypeError(
                f"documents are texts by id, two strings; got {document!r}: {type(text).__name__}"
            )
    texts = by_id(texts)
    for document, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"document {document!r} has half of a surrogate pair at character {error.start}, which no file takes"
            ) from None
        n = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if n < 2:
            told = "is empty" if n == 0 else "has one token"
            raise ValueError(
                f"document {document!r} {told}; a shard learns to predict the next token, from two at least"
            )
    return texts


def check_new(documents: Iterable[str], index: BankIndex) -> None:
    """Raise ValueError where a document is in the bank; where it is is not told."""
    present = {document for entry in index.shards.values() for document in entry.documents}
    for document in sorted(present & set(documents)):
        raise ValueError(f"document {document!r} is in the bank already; update or forget that one")
