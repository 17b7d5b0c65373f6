"""`LoRABank`: documents in LoRA shards, with rights to read, and with deletion that leaves nothing behind.

    bank = LoRABank.create("notes/", model, tokenizer, memory="notes")
    bank.add({"handbook": text}, group="red")
    state = bank.read(questions, groups=[["red"], ["red", "blue"]])     # a row a question
    model.generate(**tokens, past_key_values=state.to_cache())
    bank.forget("handbook")

Every operation looks at `bank.json` anew, so that several objects, in several processes, can read one bank while one
of them changes it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from . import recipes
from . import shard as files_of
from .bank_config import LoRABankConfig
from .ids import check_id, ids_of
from .index import BankIndex, check_name
from .reader import check_fits, check_lengths, known_shard, lora_memory, shape_of
from .recipes import Recipe
from .repair import BankReport, examine, rebuild
from .router import Encoder
from .shard import ShardManifest, manifest_of
from .store import Store
from .writer import BankWriter, check_free

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoRABank(BankWriter):
    """A folder of LoRA shards of one model, each trained on some documents of one group.

    Documents have ids that are theirs alone in the bank, and ids that look alike are one (`ids.py`). A change takes the
    bank for one process; readers never wait and see it before or after the change. A crash leaves it before or after.
    Every file that is read is compared with its SHA-256. What is not the bank's own is never deleted, and no link is
    followed.

    Attributes:
        path: the folder.
        model: with the LoRA memory `memory` attached.
        memory: the name of that memory.
        config: of the bank.
    """

    def __init__(self, store: Store, index: BankIndex, model, tokenizer, memory: str, encoder, clock):
        super().__init__(store, index, model, tokenizer, memory, encoder)
        self._clock = clock or _now

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        memory: str = "lora",
        config: LoRABankConfig | None = None,
        encoder: Encoder | None = None,
        clock: Callable[[], str] | None = None,
    ) -> LoRABank:
        """Make an empty bank.

        Args:
            path: of a folder that is not there, or empty; what it holds is never taken over.
            model: with a LoRA memory called `memory`, whose r, lora_alpha and targets all shards take.
            encoder: makes the router's vectors in the model's place; needed again to open the bank.
            clock: the time now in ISO 8601; default: the system's, in UTC.

        Raises:
            FileExistsError: something is at `path`.
            NotADirectoryError: a file stands at `path` or above it.
            KeyError: the model has no memory of that name.
            TypeError: that memory is of another kind.
            ConfigError: segments longer than the model reads.
        """
        config = config or LoRABankConfig()
        store, owner = Store(path), lora_memory(model, memory)
        check_lengths(model, config)
        index = BankIndex(
            base=files_of.base_hash(model),
            router="model" if encoder is None else "user",
            config=config,
            shards={},
            **shape_of(model, owner),
        )
        store.create(index)
        return cls(store, index, model, tokenizer, memory, encoder, clock)

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        memory: str = "lora",
        encoder: Encoder | None = None,
        clock: Callable[[], str] | None = None,
        repair: bool = False,
    ) -> LoRABank:
        """Open a bank that `create` made, and finish a deletion that a crash has interrupted.

        It deletes what `bank.json` says is to go, and nothing else; a warning tells what cannot be deleted.

        Args:
            repair: where `bank.json` is damaged, missing, or of an earlier version, make it again from the shards that
                are whole (see `repair.rebuild`).

        Raises:
            FileNotFoundError: no bank at `path`.
            DamagedFile: `bank.json` is not as it was written; or it or `shards` is a link.
            ConfigError: `bank.json` is of another format, or a field is wrong.
            ValueError: the bank belongs to another base, or its LoRA memory or its encoder was another.
            KeyError, TypeError: as in `create`.
        """
        store, owner = Store(path), lora_memory(model, memory)
        if repair:
            rebuild(store, model, tokenizer, encoder, shape_of(model, owner))
        index = store.read()
        check_fits(store, index, model, memory, encoder)
        bank = cls(store, index, model, tokenizer, memory, encoder, clock)
        if store.is_unfinished(index):
            bank._finish()
        return bank

    def add(
        self, documents: Mapping[str, str], group: str, name: str | None = None, *, progress: bool = False
    ) -> ShardManifest:
        """Train a new shard on `documents`.

        Args:
            documents: id to text.
            group: whoever may read it may read the shard.
            name: of the shard; None: a hash of its group and the ids of its documents, another one when one of them
                is forgotten.
            progress: show a progress bar.

        Returns:
            The manifest of the shard.

        Raises:
            ValueError: no documents, an id that is in the bank or has control characters, a text without at least two
                tokens, a name that is taken or cannot name a folder; a loss that is not finite. The bank is as it was.
            BankLocked: another process changes the bank.
            DamagedFile: `bank.json` is not as it was written.
            FileExistsError: something that is not ours is in the way, or would outlive its deletion. Nothing was
                changed.
            OSError: the disk is full, say; names what was being written. The bank is as it was.
        """
        texts = recipes.check_texts(self.tokenizer, documents)
        if not isinstance(group, str) or not group:
            raise ValueError(f"group must be a text that is not empty, got {group!r}")
        group = check_id(group, "the group")
        name = recipes.own_name(group, texts) if name is None else name
        check_name(name)
        with self._changing() as index:
            recipes.check_new(texts, index)
            check_free(name, index.shards)
            return self._replace(index, [], [Recipe(name, group, texts, self._clock())], progress)[0]

    def update(self, documents: Mapping[str, str], *, progress: bool = False) -> list[ShardManifest]:
        """Train the shards of `documents` again, with the new texts in the place of the old ones.

        Each shard gets the next version, and the sha256 of the adapter that it had as its parent.

        Returns:
            The manifests of these shards.

        Raises:
            KeyError: a document that is not in the bank.
            DamagedFile: the text of another document of such a shard is damaged.
            ValueError, BankLocked, OSError: as in `add`.
        """
        new = recipes.check_texts(self.tokenizer, documents)
        with self._changing() as index:
            old = self._library.holding(index, new)
            made = [recipes.updated(m, self._library.texts(index, m.name, but=new), new) for m in old]
            return self._replace(index, old, made, progress)

    def forget(self, documents: str | Sequence[str], *, progress: bool = False) -> list[ShardManifest]:
        """Delete documents, and train their shards again without them.

        Afterwards the bank's folder is byte for byte that of a bank which never had them. Each shard is what `add`
        makes of its other documents, under its name and with its time of creation. Its history is that of the other
        documents too: updates of nothing but forgotten ones are not counted in `version`. One thing cannot be had
        back: adapters of earlier versions without the document, whose texts are gone. So `parent` is None until the
        next update. A shard that has no other documents goes; one that was given no name is called after those that
        it still has.

        A damaged bank forgets too: no other shard need be whole, nor the document's own where it holds no others. Where
        texts of other documents of the same shard are damaged, what is left of them may hold what is to be forgotten,
        so they go with it, and a warning names them.

        When it is interrupted after the change is made, the next `open` or change deletes what is left.

        Returns:
            The manifests of the shards that were trained again.

        Raises:
            KeyError: a document that is not in the bank.
            FileExistsError: a link, another name of a file, or a copy in a folder of another shard or of none would
                keep the text. Nothing was changed; the message says what to delete.
            ValueError, BankLocked, OSError: as in `add`.
        """
        gone = ids_of(documents)
        with self._changing() as index:
            old = self._library.holding(index, gone)
            self._check_no_copies(index, old, gone)
            left, lost = self._without(index, old, gone)
            made = [self._make(index, recipe, progress) for recipe in left]
            manifests = self._put(index, old, made, deletes_first=True)
        if lost:
            warnings.warn(
                f"the texts of documents {lost} were damaged, and have gone from the bank at {self.path} too; add them "
                "again",
                stacklevel=2,
            )
        return manifests

    def merge(
        self, shards: Sequence[str], name: str | None = None, *, progress: bool = False
    ) -> ShardManifest:
        """Train one new shard on the documents of several of one group, and delete those.

        Args:
            shards: two names at least.
            name: of the new shard, as in `add`; may be one of `shards`.
            progress: show a progress bar.

        Raises:
            KeyError: a shard that is not in the bank.
            ValueError: fewer than two shards, shards of several groups, a name that is taken; and as in `add`.
            BankLocked, OSError: as in `add`.
        """
        chosen = sorted(set(shards))
        if isinstance(shards, str) or len(chosen) < max(2, len(shards)):
            raise ValueError(f"merge needs two different shards at least, got {shards!r}")
        with self._changing() as index:
            old = [manifest_of(index, known_shard(shard, index)) for shard in chosen]
            groups = sorted({manifest.group for manifest in old})
            if len(groups) > 1:
                raise ValueError("shards of several groups cannot be merged; a shard has one group")
            texts = {d: text for m in old for d, text in self._library.texts(index, m.name).items()}
            name = recipes.own_name(groups[0], texts) if name is None else name
            check_name(name)
            check_free(name, set(index.shards) - set(chosen))
            return self._replace(index, old, [Recipe(name, groups[0], texts, self._clock())], progress)[0]

    def repair(self, *, dry_run: bool = False, progress: bool = False) -> BankReport:
        """Tell what is damaged or unknown in the bank's folder, and mend what can be mended without loss.

        A shard whose texts are all whole gets its other files again: the manifest from `bank.json`, the adapter by
        training, the router's vectors from the texts. Nothing is deleted but what `bank.json` says is to go.

        Args:
            dry_run: tell only.
            progress: show progress bars.

        Raises:
            DamagedFile, ConfigError: `bank.json` cannot be read; `open` with `repair=True` makes it again.
            ValueError, BankLocked, OSError: as in `add`.
        """
        while dry_run:
            index = self._store.read()
            report = examine(self._store, index)
            if self._store.read() == index:  # else another process has changed it under our hands
                return report
        mended = {}
        with self._changing() as index:
            failed = self._store.finish()
            for name, damage in examine(self._store, index).damaged.items():
                if self._mend(self._store.read(), name, progress):
                    mended[name] = damage
            index = self._store.read()
            leftovers = {f"shards/{folder}": str(error) for folder, error in failed.items()}
            return dataclasses.replace(examine(self._store, index), mended=mended, leftovers=leftovers)


def _now() -> str:
    return datetime.now(UTC).isoformat()
