"""Reading a bank of LoRA shards: rights, routes, and the state that mixes a question's shards.

Every operation looks at `bank.json` anew, so that several objects, in several processes, can read one bank while one
of them changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.memory import fresh_state
from ..core.model import device_of, memories, stateful
from ..core.state import MemoryState
from ..files import make_folder, write_whole
from . import shard as files_of
from .library import Library
from .mixing import mixed
from .patch import LoRAMemories
from .router import Encoder, Router, best, scores_of
from .shard import ShardManifest
from .store import BankIndex, Store

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
            ValueError: a group that is not in the bank.
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
            groups: for each question, the groups that its asker may read; a row without any gets no shard.
            top_k: shards a question, at most. Several answer worse than the best one where the router finds it (see
                eval/results/lora_bank.md); they help where a question needs several.

        Raises:
            ValueError: a group that is not in the bank; not a row of groups for each question; top_k below 1; a
                question without tokens.
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
            ValueError: the weights do not match their manifest.
        """
        files = self._reading(lambda index: self._library.peft_files(index, known_shard(shard, index)))
        make_folder(Path(folder))
        for name, data in files.items():
            write_whole(Path(folder) / name, lambda path, data=data: path.write_bytes(data))
        return Path(folder)

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
    """The shards that `groups` may read, by name."""
    if isinstance(groups, str):
        raise TypeError(f"groups are a list of names, got the text {groups!r}")
    known = {entry.group for entry in index.shards.values()}
    for group in groups:
        if group not in known:
            raise ValueError(f"no group {group!r} in this bank")
    return sorted(name for name, entry in index.shards.items() if entry.group in set(groups))


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
