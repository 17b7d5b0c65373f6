"""`MemoryState`: what a model remembers, as a value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from ..files import DamagedFile, read_tensors, write_tensors
from ..files.tensors import check_finite
from ..files.texts import parse_json
from .cache import MemoryCache

Fields = dict[str, torch.Tensor]
"""One memory's part of a `MemoryState`: batch-first tensors by name."""
FORMAT, WITHOUT_CHECKSUMS = "memlayers.state.v2", "memlayers.state.v1"
PENDING = "pending"
"""Name under which a state keeps the tokens of the open segment: read, not yet written."""


@dataclass(eq=False, repr=False)
class MemoryState:
    """What the memories of one model hold for each row of a batch.

    Two levels of names: memory → field → tensor. Every tensor is batch-first. A field whose second
    dimension differs between rows is right-aligned and has a `length` field beside it, so that rows of
    different length can be put together. No operation changes a state in place.

    Attributes:
        fields: the tensors.
        kinds: which kind of memory wrote each part, by the memory's name; a part without one is taken on trust.
        trusted: parts whose numbers were made by a memory, or looked at once by the one that reads them. Those of a file, or
            made by hand, are not: their lengths could say anything. Shapes are looked at in every call, because that costs
            nothing; numbers only in the first one, because it would make each step of decoding wait for the device.
    """

    fields: dict[str, Fields]
    kinds: dict[str, str] = field(default_factory=dict)
    trusted: frozenset[str] = frozenset()

    def __post_init__(self):
        tensors = [t for part in self.fields.values() for t in part.values()]
        if any(t.dim() == 0 for t in tensors):
            raise ValueError("the tensors of a MemoryState are batch-first; one of them has no dimension")
        sizes = {t.shape[0] for t in tensors}
        if len(sizes) > 1:
            raise ValueError(f"the tensors of a MemoryState differ in batch size: {sorted(sizes)}")
        self.batch_size = sizes.pop() if sizes else None

    def __getitem__(self, name: str) -> Fields:
        return self.fields[name]

    def __repr__(self) -> str:
        shapes = {n: {f: tuple(t.shape) for f, t in part.items()} for n, part in self.fields.items()}
        return f"MemoryState({shapes})"

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MemoryState:
        parts = {n: {f: function(t) for f, t in part.items()} for n, part in self.fields.items()}
        return MemoryState(parts, self.kinds, self.trusted)

    def replace(self, parts: Mapping[str, Fields]) -> MemoryState:
        """The state with other fields for some memories."""
        return MemoryState({**self.fields, **parts}, self.kinds, self.trusted)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for part in self.fields.values() for t in part.values())

    def clone(self) -> MemoryState:
        """A copy that shares no storage."""
        return self._map(torch.Tensor.clone)

    def detach(self) -> MemoryState:
        """The same values without gradient history."""
        return self._map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> MemoryState:
        """The state on another device."""
        return self._map(lambda t: t.to(device))

    def select(self, rows: Sequence[int] | torch.Tensor) -> MemoryState:
        """The given rows, in order, repeats allowed: `select([0] * 8)` asks one memory eight questions. Or, as booleans, a
        mask of the rows to keep.

        Raises:
            IndexError: a row that is not there.
        """
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            if self.batch_size is not None and index.shape != (self.batch_size,):
                raise IndexError(
                    f"a mask of shape {tuple(index.shape)} for a MemoryState with {self.batch_size} rows"
                )
            index = index.nonzero().flatten()
        index = index.to(torch.int64)
        for row in (
            [int(index.min()), int(index.max())] if index.numel() and self.batch_size is not None else []
        ):
            if not 0 <= row < self.batch_size:
                raise IndexError(f"row {row} of a MemoryState with {self.batch_size} rows")
        return self._map(lambda t: t.index_select(0, index.to(t.device)))

    def repeat_interleave(self, repeats: int) -> MemoryState:
        """Each row `repeats` times, as `generate` lays out beams and returned sequences."""
        return self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def zeros_like(self) -> MemoryState:
        """The state with every floating-point tensor at zero: the control "zeroed memory"."""
        return self._map(lambda t: torch.zeros_like(t) if t.is_floating_point() else t.clone())

    @staticmethod
    def cat(states: Sequence[MemoryState]) -> MemoryState:
        """The rows of several states in one; ragged fields are padded on the left.

        Raises:
            ValueError: no states, or states of different memories; fields of other widths or kinds of numbers.
        """
        if not states:
            raise ValueError("MemoryState.cat needs at least one state")
        names = {n: set(part) for n, part in states[0].fields.items()}
        for state in states[1:]:
            same_kinds = all(states[0].kinds.get(n, kind) == kind for n, kind in state.kinds.items())
            if not same_kinds or {n: set(part) for n, part in state.fields.items()} != names:
                raise ValueError("MemoryState.cat: the states come from different memories")
        parts = {
            n: {f: _stack([s.fields[n][f] for s in states], f"{n}.{f}") for f in fields}
            for n, fields in names.items()
        }
        kinds = {n: kind for state in states for n, kind in state.kinds.items()}
        return MemoryState(parts, kinds, frozenset.intersection(*(state.trusted for state in states)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with checksums, whole or not at all. A file that exists keeps its mode: what is in a
        state was said by somebody.

        Raises:
            IsADirectoryError: a folder stands at `path`.
            ValueError: a number that is not finite; names the field.
            OSError: the disk is full, say; what stood at `path` stands still.
        """
        tensors = {f"{n}.{f}": t for n, part in self.fields.items() for f, t in part.items()}
        names = {n: sorted(part) for n, part in self.fields.items()}
        metadata = {"format": FORMAT, "fields": json.dumps(names), "kinds": json.dumps(self.kinds)}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", *, verify: bool = True
    ) -> MemoryState:
        """Read what `save` wrote.

        Args:
            verify: compare the checksums; False takes what is there, from before there were any too.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: a cut or damaged file, a safetensors file that is not a memory state, or numbers that are not
                finite; names file and field.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no memory state at {path}")
        # Copies, because a tensor of the file starts anywhere, and products of such round in another way.
        # Numbers whose checksums fit are finite: `save` writes no others.
        tensors, metadata = read_tensors(path, verify=verify, device=device, finite=False)
        if metadata.get("format") not in (FORMAT, WITHOUT_CHECKSUMS):
            raise DamagedFile(f"{path} is a safetensors file but not a memory state (no format {FORMAT!r})")
        names, kinds = _names(path, tensors, metadata)
        if not verify:
            check_finite(path, tensors)
        parts = {n: {f: tensors[f"{n}.{f}"] for f in part} for n, part in names.items()}
        try:
            return cls(parts, kinds)
        except ValueError as error:
            raise DamagedFile(f"{path}: {error}") from None

    def to_cache(self) -> MemoryCache:
        """A cache with this memory and an empty attention window, for `past_key_values=`."""
        return MemoryCache(self)


def _names(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The fields of each memory, and the kinds, that a file says it holds; DamagedFile unless it holds those."""
    names = parse_json(metadata.get("fields", "null"), f"{path}: fields")
    kinds = parse_json(metadata.get("kinds", "{}"), f"{path}: kinds")
    listed = isinstance(names, dict) and all(isinstance(part, list) for part in names.values())
    if not listed or sorted(f"{n}.{f}" for n, part in names.items() for f in part) != sorted(tensors):
        raise DamagedFile(f"{path}: fields in its metadata are not those of the tensors {sorted(tensors)}")
    if not isinstance(kinds, dict) or not all(
        n in names and isinstance(kind, str) for n, kind in kinds.items()
    ):
        raise DamagedFile(
            f"{path}: kinds in its metadata must name the kind of each memory, got {str(kinds)[:80]}"
        )
    return names, kinds


def _stack(tensors: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    if len({(t.dtype, t.dim(), t.shape[2:]) for t in tensors}) > 1:
        shapes = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in tensors)
        raise ValueError(f"MemoryState.cat: field {name!r} has shapes that do not fit together: {shapes}")
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    width = max(t.shape[1] for t in tensors)
    padded = [
        torch.cat([t.new_zeros(t.shape[0], width - t.shape[1], *t.shape[2:]), t], dim=1) for t in tensors
    ]
    return torch.cat(padded)


def _flatten(state: MemoryState):
    names = [(n, f) for n, part in state.fields.items() for f in part]
    return [state.fields[n][f] for n, f in names], (names, state.kinds, state.trusted)


def _unflatten(tensors, context) -> MemoryState:
    """Built without a look at the tensors: who flattens puts placeholders in their place."""
    names, kinds, trusted = context
    state, state_fields = object.__new__(MemoryState), {}
    for (n, f), tensor in zip(names, tensors, strict=True):
        state_fields.setdefault(n, {})[f] = tensor
    state.fields, state.kinds, state.trusted = state_fields, kinds, trusted
    first = next(iter(tensors), None)
    state.batch_size = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() else None
    return state


# DDP, torch.func and others take outputs apart and put them together again.
pytree.register_pytree_node(MemoryState, _flatten, _unflatten, serialized_type_name="memlayers.MemoryState")
