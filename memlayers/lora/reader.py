"""Reading a bank of LoRA shards: rights, routes, and the state that mixes a question's shards.

Every operation looks at `bank.json` anew, so that several objects, in several processes, can read one bank while one
of them changes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..config import ConfigError
from ..core.memory import fresh_state
from ..core.model import device_of, max_positions, memories, stateful, unwrap
from ..core.state import MemoryState
from ..files import make_folder, together
from . import shard as files_of
from .bank_config import LoRABankConfig
from .ids import one_form
from .index import BankIndex
from .library import Library
from .mixing import mixed
from .patch import LoRAMemories
from .router import Encoder, Router, best, scores_of
from .shard import ShardManifest
from .store import Store

Route = list[tuple[str, float]]
"""The shards of one question, best first, and their weights."""
Answer = TypeVar("Answer")


class BankReader:
    """What `LoRABank` does without a lock; see there."""

    def __init__(
        self, store: Store, index: BankIndex, model, tokenizer, memory: str, encoder: Encoder | None
    ):
        owner = lora_memory(model, memory)
        self.path, self.config = store.path, index.config
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self._store = store
        self._targets = files_of.targets_of(model, owner)
        self._library = Library(store, self._targets, owner.new_state(1))
        self._router = Router(model, tokenizer, index.config, encoder)

    def list(self, groups: Sequence[str] | None = None) -> list[ShardManifest]:
        """The manifests of the shards that `groups` may read, by name; None: of all.

        Raises:
            FileNotFoundError, DamagedFile: the manifest of one of them is missing or damaged; names it.
        """

        def manifests(index: BankIndex):
            names = sorted(index.shards) if groups is None else permitted(index, groups)
            return [self._library.manifest(index, name) for name in names]

        return self._reading(manifests)

    def route(
        self, questions: Sequence[str], *, groups: Sequence[Sequence[str]], top_k: int = 1
    ) -> Sequence[Route]:
        """The shards that answer each question, best first, with the weights by which `read` mixes them.

        Only shards that a row's groups may read are looked at: the others, and other rows, change nothing.

        Args:
            questions: texts.
            groups: for each question, the groups that its asker may read; a row without any gets no shard. A group
                that has no shards, or never had any, adds nothing.
            top_k: shards a question, at most. Several answer worse than the best one where the router finds it (see
                docs/results.md); they help where a question needs several.

        Raises:
            ValueError: not a row of groups for each question; top_k below 1; a question without tokens.
            FileNotFoundError, DamagedFile: a file of a shard that a row may read, and that its answer needs, is missing
                or damaged; names it.
        """
        check_rows(questions, groups, top_k)
        return self._reading(lambda index: self._routes(index, questions, groups, top_k))

    def read(
        self, questions: Sequence[str], *, groups: Sequence[Sequence[str]], top_k: int = 1
    ) -> MemoryState:
        """What the bank has on each question, as a state for `forward` and `generate`.

        The adapters of a row's shards stand side by side, each B times its weight: rank top_k · r, zeros where a row
        has fewer shards.

        Args, Raises: as in `route`.

        Returns:
            A state of a row a question, on the model's device.
        """
        check_rows(questions, groups, top_k)

        def fields(index: BankIndex):
            routes = self._routes(index, questions, groups, top_k)
            rows = [
                [(self._library.adapter(index, shard), weight) for shard, weight in row] for row in routes
            ]
            return mixed(rows, top_k, self._library.like)

        fresh = fresh_state(stateful(self.model), len(questions))
        return fresh.replace({self.memory: self._reading(fields)}).detach().to(device_of(self.model))

    def export(self, shard: str, folder: str | Path) -> Path:
        """Copy a shard as a PEFT adapter: `PeftModel.from_pretrained(base, folder)` is the base with this shard.

        Raises:
            KeyError: a shard that is not in the bank.
            NotADirectoryError: a file stands at `folder`.
            FileExistsError: another adapter is in `folder`; it is not replaced.
            FileNotFoundError, DamagedFile: a file of the shard is missing or damaged; names it.
        """
        folder = Path(folder)
        files = self._reading(lambda index: self._library.peft_files(index, known_shard(shard, index)))
        make_folder(folder)
        for name, data in files.items():
            path = folder / name
            if os.path.lexists(path) and (
                path.is_symlink() or not path.is_file() or path.read_bytes() != data
            ):
                raise FileExistsError(f"{path} is another adapter's and is not replaced; name another folder")
        with together(folder) as change:
            for name, data in files.items():
                (change.new / name).write_bytes(data)
        return folder

    # inside
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

    def _routes(self, index: BankIndex, questions, groups, top_k: int) -> Sequence[Route]:
        # All rights are looked at before anything else is.
        readable = [permitted(index, own) for own in groups]
        routes = []
        for question, names in zip(questions, readable):
            vectors = [self._library.vectors(index, name) for name in names]
            scores = scores_of(self._router.question(question), vectors) if names else []
            routes.append(best(names, scores, top_k, self.config.temperature))
        return routes


def lora_memory(model, name: str) -> LoRAMemories:
    present = memories(model)
    if name not in present:
        raise KeyError(f"no memory named {name!r} in this model; it has {sorted(present) or 'none'}")
    if not isinstance(present[name], LoRAMemories):
        raise TypeError(f"memory {name!r} is a {type(present[name]).__name__}; a bank needs a LoRA memory")
    return present[name]


def shape_of(model, owner: LoRAMemories) -> dict[str, Any]:
    """What an adapter must have in common with the memory that reads it."""
    targets = files_of.targets_of(model, owner)
    return {"r": owner.config.r, "lora_alpha": owner.config.lora_alpha, "targets": list(targets.values())}


def permitted(index: BankIndex, groups: Sequence[str]) -> Sequence[str]:
    """The shards that `groups` may read, by name. A group without shards is no error, so that nobody learns from one
    which groups there are."""
    if isinstance(groups, str):
        raise TypeError(f"groups are a list of names, got the text {groups!r}")
    for group in groups:
        if not isinstance(group, str):
            raise TypeError(f"groups are a list of names, got {group!r} in it")
    readable = {one_form(group) for group in groups}
    return sorted(name for name, entry in index.shards.items() if entry.group in readable)


def check_lengths(model, config: LoRABankConfig) -> None:
    """Raise ConfigError where texts are read in longer pieces than the model has positions."""
    limit = max_positions(unwrap(model))
    for field in ("segment_length", "router_length"):
        if limit is not None and getattr(config, field) + 1 > limit:
            raise ConfigError(
                f"{field}: {getattr(config, field)} tokens and the one before them are more than the {limit} positions "
                "of the model"
            )


def check_fits(store: Store, index: BankIndex, model, memory: str, encoder: Encoder | None) -> None:
    """Raise ValueError where a bank was made with another base, another LoRA memory, or another encoder."""
    base = files_of.base_hash(model)
    if base != index.base:
        raise ValueError(
            f"the bank at {store.path} belongs to another base: config and tensors of this one hash to {base[:12]}…, "
            f"the bank has {index.base[:12]}…"
        )
    for field, value in shape_of(model, lora_memory(model, memory)).items():
        if getattr(index, field) != value:
            raise ValueError(
                f"the bank at {store.path} was made for a LoRA memory with {field} {getattr(index, field)}, memory "
                f"{memory!r} of this model has {value}"
            )
    if index.router != ("model" if encoder is None else "user"):
        told = "a user's encoder; pass it as encoder=" if encoder is None else "the model; pass no encoder"
        raise ValueError(f"the router's vectors of the bank at {store.path} were made by {told}")


def check_rows(questions: Sequence[str], groups: Sequence[Sequence[str]], top_k: int) -> None:
    if isinstance(questions, str) or not questions:
        raise ValueError("questions must be a list of one text at least")
    if isinstance(groups, str) or len(groups) != len(questions):
        raise ValueError(f"groups must be a list of groups for each of the {len(questions)} questions")
    if top_k < 1:
        raise ValueError(f"top_k must be 1 at least, got {top_k}")


def known_shard(shard: str, index: BankIndex) -> str:
    if shard not in index.shards:
        raise KeyError(f"no shard {shard!r} in the bank")
    return shard
