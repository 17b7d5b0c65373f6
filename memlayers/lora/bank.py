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
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..config import ConfigError
from ..files import make_folder, write_whole
from ..model import bare, max_positions, memories, stateful
from ..state import MemoryState
from ..streaming import fresh_state
from . import recipes
from . import shard as files_of
from .bank_config import LoRABankConfig
from .library import Library
from .mixing import mixed
from .patch import LoRAMemories
from .recipes import Recipe
from .router import Encoder, Router, best, scores_of
from .shard import ShardManifest, sha256
from .store import FORMAT, BankIndex, Files, ShardEntry, Store, check_name, folder_of
from .training import train_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Route = list[tuple[str, float]]
"""The shards of one question, best first, and their weights."""
Answer = TypeVar("Answer")


class LoRABank:
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
        owner = _memory(model, memory)
        self.path, self.config = store.path, index.config
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self._store, self._clock = store, clock or _now
        self._targets = files_of.targets_of(model, owner)
        self._library = Library(store, self._targets, owner.new_state(1))
        self._router = Router(model, tokenizer, index.config, encoder)

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
        store, owner = Store(path), _memory(model, memory)
        _check_lengths(model, config)
        index = BankIndex(
            format=FORMAT,
            base=files_of.base_hash(model),
            router="model" if encoder is None else "user",
            config=config,
            shards={},
            **_shape(model, owner),
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
        store, owner = Store(path), _memory(model, memory)
        index, base = store.read(), files_of.base_hash(model)
        if base != index.base:
            raise ValueError(
                f"the bank at {path} belongs to another base: config and tensors of this one hash to {base[:12]}…, the "
                f"bank has {index.base[:12]}…"
            )
        for field, value in _shape(model, owner).items():
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

    # changing the bank

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
            old = [self._library.manifest(index, _known(shard, index)) for shard in chosen]
            groups = sorted({manifest.group for manifest in old})
            if len(groups) > 1:
                raise ValueError(f"shards of groups {groups} cannot be merged; a shard has one group")
            texts = {d: text for m in old for d, text in self._library.texts(index, m.name).items()}
            name = recipes.own_name(groups[0], texts) if name is None else name
            check_name(name)
            _check_free(name, set(index.shards) - set(chosen))
            return self._replace(index, old, [Recipe(name, groups[0], texts, self._clock())], progress)[0]

    # reading it

    def list(self, groups: Sequence[str] | None = None) -> list[ShardManifest]:
        """The manifests of the shards that `groups` may read, by name; None: of all.

        Raises:
            ValueError: a group that is not in the bank.
        """

        def manifests(index: BankIndex):
            names = sorted(index.shards) if groups is None else _permitted(index, groups)
            return [self._library.manifest(index, name) for name in names]

        return self._reading(manifests)

    def route(
        self, questions: Sequence[str], *, groups: Sequence[Sequence[str]], top_k: int = 2
    ) -> Sequence[Route]:
        """The shards that answer each question, best first, with the weights by which `read` mixes them.

        Only shards that a row's groups may read are looked at: the others, and other rows, change nothing.

        Args:
            questions: texts.
            groups: for each question, the groups that its asker may read; a row without any gets no shard.
            top_k: shards a question, at most.

        Raises:
            ValueError: a group that is not in the bank; not a row of groups for each question; top_k below 1; a
                question without tokens.
        """
        _check_rows(questions, groups, top_k)
        return self._reading(lambda index: self._routes(index, questions, groups, top_k))

    def read(
        self, questions: Sequence[str], *, groups: Sequence[Sequence[str]], top_k: int = 2
    ) -> MemoryState:
        """What the bank has on each question, as a state for `forward` and `generate`.

        The adapters of a row's shards stand side by side, each B times its weight: rank top_k · r, zeros where a row
        has fewer shards.

        Args, Raises: as in `route`.

        Returns:
            A state of a row a question, on the model's device.
        """
        _check_rows(questions, groups, top_k)

        def fields(index: BankIndex):
            routes = self._routes(index, questions, groups, top_k)
            rows = [
                [(self._library.adapter(index, shard), weight) for shard, weight in row] for row in routes
            ]
            return mixed(rows, top_k, self._library.like)

        others = fresh_state(stateful(self.model), len(questions)).fields
        device = self.model.get_input_embeddings().weight.device
        return MemoryState({**others, self.memory: self._reading(fields)}).detach().to(device)

    def export(self, shard: str, folder: str | Path) -> Path:
        """Copy a shard as a PEFT adapter: `PeftModel.from_pretrained(base, folder)` is the base with this shard.

        Raises:
            KeyError: a shard that is not in the bank.
            NotADirectoryError: a file stands at `folder`.
            ValueError: the weights do not match their manifest.
        """
        files = self._reading(lambda index: self._library.peft_files(index, _known(shard, index)))
        make_folder(Path(folder))
        for name, data in files.items():
            write_whole(Path(folder) / name, lambda path, data=data: path.write_bytes(data))
        return Path(folder)

    # inside

    @contextlib.contextmanager
    def _changing(self) -> Iterator[BankIndex]:
        """The bank as it is on disk, held by this object alone, and clean."""
        self._store.read()
        with self._store.locked():
            self._store.clean()
            yield self._store.read()

    def _reading(self, use: Callable[[BankIndex], Answer]) -> Answer:
        """`use` of the bank as it is on disk; again where another process has changed it under our hands."""
        while True:
            index = self._store.read()
            self._library.drop_old(index)
            try:
                return use(index)
            except FileNotFoundError:
                if self._store.read() == index:
                    raise

    def _replace(
        self, index: BankIndex, old: Sequence[ShardManifest], new: Sequence[Recipe], progress: bool
    ) -> Sequence[ShardManifest]:
        """Make the shards `new` and put them in the place of the `old` ones; their manifests."""
        gone = {manifest.name for manifest in old}
        shards = {name: entry for name, entry in index.shards.items() if name not in gone}
        made, folders = [], {}
        for recipe in new:
            manifest, files = self._made(recipe, index, progress)
            folder = folder_of(recipe.name, files)
            shards[recipe.name] = ShardEntry(folder=folder, group=recipe.group)
            folders[folder] = files
            made.append(manifest)
        after = index.model_copy(update={"shards": shards})
        self._store.commit(after, folders)
        self._library.drop_old(after)
        return made

    def _made(self, recipe: Recipe, index: BankIndex, progress: bool) -> tuple[ShardManifest, Files]:
        """Train a shard; its manifest and all its files. Nothing is written."""
        owner, texts = _memory(self.model, self.memory), recipe.texts
        fields = train_shard(
            self.model, self.memory, self.tokenizer, texts, recipe.name, self.config, progress=progress
        )
        vectors = torch.cat([self._router.document(texts[document]) for document in sorted(texts)])
        files = {
            files_of.ADAPTER: files_of.adapter_bytes(fields, self._targets),
            files_of.ADAPTER_CONFIG: files_of.adapter_config_bytes(self.model, owner, self._targets),
            files_of.DOCUMENTS: files_of.documents_bytes(texts),
            files_of.ROUTER: files_of.router_bytes(vectors),
        }
        manifest = ShardManifest(
            name=recipe.name,
            group=recipe.group,
            documents={document: sha256(texts[document]) for document in sorted(texts)},
            created=recipe.created,
            version=recipe.version,
            updated={document: recipe.updated[document] for document in sorted(recipe.updated)},
            parent=recipe.parent,
            training=self.config,
            seed=self.config.seed,
            base=index.base,
            adapter=sha256(files[files_of.ADAPTER]),
            router=sha256(files[files_of.ROUTER]),
            **_shape(self.model, owner),
        )
        return manifest, {**files, files_of.MANIFEST: files_of.manifest_bytes(manifest)}

    def _routes(self, index: BankIndex, questions, groups, top_k: int) -> Sequence[Route]:
        # All rights are looked at before anything else is.
        permitted = [_permitted(index, own) for own in groups]
        routes = []
        for question, names in zip(questions, permitted):
            vectors = [self._library.vectors(index, name) for name in names]
            scores = scores_of(self._router.question(question), vectors) if names else []
            routes.append(best(names, scores, top_k, self.config.temperature))
        return routes


def _memory(model, name: str) -> LoRAMemories:
    present = memories(model)
    if name not in present:
        raise KeyError(f"no memory named {name!r} in this model; it has {sorted(present) or 'none'}")
    if not isinstance(present[name], LoRAMemories):
        raise TypeError(f"memory {name!r} is a {type(present[name]).__name__}; a bank needs a LoRA memory")
    return present[name]


def _shape(model, owner: LoRAMemories) -> dict[str, Any]:
    """What an adapter must have in common with the memory that reads it."""
    targets = files_of.targets_of(model, owner)
    return {"r": owner.config.r, "lora_alpha": owner.config.lora_alpha, "targets": list(targets.values())}


def _check_lengths(model, config: LoRABankConfig) -> None:
    limit = max_positions(bare(model))
    for field in ("segment_length", "router_length"):
        if limit is not None and getattr(config, field) + 1 > limit:
            raise ConfigError(
                f"{field}: {getattr(config, field)} tokens and the one before them are more than the {limit} positions "
                "of the model"
            )


def _permitted(index: BankIndex, groups: Sequence[str]) -> Sequence[str]:
    """The shards that `groups` may read, by name."""
    if isinstance(groups, str):
        raise TypeError(f"groups are a list of names, got the text {groups!r}")
    known = {entry.group for entry in index.shards.values()}
    for group in groups:
        if group not in known:
            raise ValueError(f"no group {group!r} in this bank")
    return sorted(name for name, entry in index.shards.items() if entry.group in set(groups))


def _check_rows(questions: Sequence[str], groups: Sequence[Sequence[str]], top_k: int) -> None:
    if isinstance(questions, str) or not questions:
        raise ValueError("questions must be a list of one text at least")
    if isinstance(groups, str) or len(groups) != len(questions):
        raise ValueError(f"groups must be a list of groups for each of the {len(questions)} questions")
    if top_k < 1:
        raise ValueError(f"top_k must be 1 at least, got {top_k}")


def _check_free(name: str, taken) -> None:
    if name in taken:
        raise ValueError(f"the bank has a shard {name!r} already; choose another name")


def _known(shard: str, index: BankIndex) -> str:
    if shard not in index.shards:
        raise KeyError(f"no shard {shard!r} in the bank")
    return shard


def _now() -> str:
    return datetime.now(UTC).isoformat()
