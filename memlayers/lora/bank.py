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

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ConfigError
from ..core.model import max_positions, unwrap
from . import recipes
from . import shard as files_of
from .bank_config import LoRABankConfig
from .making import make_shard
from .reader import BankReader, known_shard, lora_memory, shape_of
from .recipes import Recipe
from .router import Encoder
from .shard import ShardManifest
from .store import FORMAT, BankIndex, ShardEntry, Store, check_name, folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoRABank(BankReader):
    """A folder of LoRA shards of one model, each trained on some documents of one group.

    Documents have ids that are theirs alone in the bank. A change takes the bank for one process; readers never wait
    and see it before or after the change. A crash leaves it before or after.

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
            path: of a folder that is not there, or empty.
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
        _check_lengths(model, config)
        index = BankIndex(
            format=FORMAT,
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
    ) -> LoRABank:
        """Open a bank that `create` made, and delete what a crash left over in it.

        Raises:
            FileNotFoundError: no bank at `path`.
            ConfigError: `bank.json` is of another format, or a field is wrong.
            ValueError: the bank belongs to another base, or its LoRA memory or its encoder was another.
            KeyError, TypeError: as in `create`.
        """
        store, owner = Store(path), lora_memory(model, memory)
        index, base = store.read(), files_of.base_hash(model)
        if base != index.base:
            raise ValueError(
                f"the bank at {path} belongs to another base: config and tensors of this one hash to {base[:12]}…, the "
                f"bank has {index.base[:12]}…"
            )
        for field, value in shape_of(model, owner).items():
            if getattr(index, field) != value:
                raise ValueError(
                    f"the bank at {path} was made for a LoRA memory with {field} {getattr(index, field)}, memory "
                    f"{memory!r} of this model has {value}"
                )
        if index.router != ("model" if encoder is None else "user"):
            told = (
                "a user's encoder; pass it as encoder=" if encoder is None else "the model; pass no encoder"
            )
            raise ValueError(f"the router's vectors of the bank at {path} were made by {told}")
        bank = cls(store, index, model, tokenizer, memory, encoder, clock)
        with contextlib.suppress(
            RuntimeError, OSError
        ):  # who changes it now cleans it; a disk may be read-only
            with store.locked():
                store.clean()
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
            ValueError: no documents, an id that is in the bank, a text without at least two tokens, a name that is
                taken or cannot name a folder; a loss that is not finite. The bank is as it was.
            BankLocked: another process changes the bank.
            OSError: the disk is full. The bank is as it was.
        """
        texts = dict(documents)
        recipes.check_texts(self.tokenizer, texts)
        if not isinstance(group, str) or not group:
            raise ValueError(f"group must be a text that is not empty, got {group!r}")
        name = recipes.own_name(group, texts) if name is None else name
        check_name(name)
        with self._changing() as index:
            recipes.check_new(texts, self._library.manifests(index))
            _check_free(name, index.shards)
            return self._replace(index, [], [Recipe(name, group, texts, self._clock())], progress)[0]

    def update(self, documents: Mapping[str, str], *, progress: bool = False) -> list[ShardManifest]:
        """Train the shards of `documents` again, with the new texts in the place of the old ones.

        Each shard gets the next version, and the sha256 of the adapter that it had as its parent.

        Returns:
            The manifests of these shards.

        Raises:
            KeyError: a document that is not in the bank.
            ValueError, BankLocked, OSError: as in `add`.
        """
        new = dict(documents)
        recipes.check_texts(self.tokenizer, new)
        with self._changing() as index:
            old = self._library.holding(index, new)
            made = [recipes.updated(m, self._library.texts(index, m.name), new) for m in old]
            return self._replace(index, old, made, progress)

    def forget(self, documents: str | Sequence[str], *, progress: bool = False) -> list[ShardManifest]:
        """Delete documents, and train their shards again without them.

        Afterwards the bank's folder is byte for byte that of a bank which never had them. Each shard is what `add`
        makes of its other documents, under its name and with its time of creation. Its history is that of the other
        documents too: updates of nothing but forgotten ones are not counted in `version`. One thing cannot be had
        back: adapters of earlier versions without the document, whose texts are gone. So `parent` is None until the
        next update. A shard that has no other documents goes; one that was given no name is called after those that
        it still has.

        Returns:
            The manifests of the shards that were trained again.

        Raises:
            KeyError: a document that is not in the bank.
            ValueError, BankLocked, OSError: as in `add`.
        """
        gone = {documents} if isinstance(documents, str) else set(documents)
        with self._changing() as index:
            old = self._library.holding(index, gone)
            left = [recipes.without(m, self._library.texts(index, m.name), gone) for m in old]
            return self._replace(index, old, [recipe for recipe in left if recipe is not None], progress)

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
            old = [self._library.manifest(index, known_shard(shard, index)) for shard in chosen]
            groups = sorted({manifest.group for manifest in old})
            if len(groups) > 1:
                raise ValueError(f"shards of groups {groups} cannot be merged; a shard has one group")
            texts = {d: text for m in old for d, text in self._library.texts(index, m.name).items()}
            name = recipes.own_name(groups[0], texts) if name is None else name
            check_name(name)
            _check_free(name, set(index.shards) - set(chosen))
            return self._replace(index, old, [Recipe(name, groups[0], texts, self._clock())], progress)[0]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[BankIndex]:
        """The bank as it is on disk, held by this object alone, and clean."""
        self._store.read()
        with self._store.locked():
            self._store.clean()
            yield self._store.read()

    def _replace(
        self, index: BankIndex, old: Sequence[ShardManifest], new: Sequence[Recipe], progress: bool
    ) -> Sequence[ShardManifest]:
        """Make the shards `new` and put them in the place of the `old` ones; their manifests."""
        gone = {manifest.name for manifest in old}
        shards = {name: entry for name, entry in index.shards.items() if name not in gone}
        made, folders = [], {}
        for recipe in new:
            manifest, files = make_shard(
                self.model,
                self.memory,
                self.tokenizer,
                recipe,
                self._router,
                index.base,
                self.config,
                progress=progress,
            )
            folder = folder_of(recipe.name, files)
            shards[recipe.name] = ShardEntry(folder=folder, group=recipe.group)
            folders[folder] = files
            made.append(manifest)
        after = index.model_copy(update={"shards": shards})
        self._store.commit(after, folders)
        self._library.drop_old(after)
        return made


def _check_lengths(model, config: LoRABankConfig) -> None:
    limit = max_positions(unwrap(model))
    for field in ("segment_length", "router_length"):
        if limit is not None and getattr(config, field) + 1 > limit:
            raise ConfigError(
                f"{field}: {getattr(config, field)} tokens and the one before them are more than the {limit} positions "
                "of the model"
            )


def _check_free(name: str, taken) -> None:
    if name in taken:
        raise ValueError(f"the bank has a shard {name!r} already; choose another name")


def _now() -> str:
    return datetime.now(UTC).isoformat()
