"""What the kinds of memory say of themselves, for errors that tell which of them would do."""

from __future__ import annotations

from memlayers.core.memory import Memory
from memlayers.kinds import KINDS


def does(memory: Memory | type[Memory], method: str) -> bool:
    """Whether a memory has a `method` of its own and not the one that all have."""
    kind = memory if isinstance(memory, type) else type(memory)
    return getattr(kind, method) is not getattr(Memory, method)


def that_do(method: str) -> str:
    """The names of the kinds that have a `method` of their own, as a text."""
    return " or ".join(kind for kind, (_, memory) in KINDS.items() if does(memory, method))
