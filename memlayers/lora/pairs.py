"""`write_pairs`: questions and answers as what is written, instead of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.checks import check_state
from ..core.memory import fresh_state
from ..core.model import stateful
from ..core.state import MemoryState
from ..writing import of_pairs
from .patch import LoRAMemories

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[tuple[str, str]]],
    state: MemoryState | None = None,
    *,
    differentiable: bool = False,
    progress: bool = False,
) -> MemoryState:
    """Write pairs of a question and its answer into the LoRA memories of `model`; the answers' tokens are learned.

    Args:
        rows: for each row of the batch, its pairs. An answer is tokenized by itself: begin it with a space where the
            tokenizer wants one.
        state: continue from here; default: a fresh state.
        differentiable, progress: as in `memlayers.write`.

    Returns:
        The new state of len(rows) rows; `state` is unchanged.

    Raises:
        ValueError: no LoRA memory; no pairs; an answer without a token; a state of other rows or another memory; a loss
            that is not finite.
    """
    memories = {name: m for name, m in stateful(model).items() if isinstance(m, LoRAMemories)}
    if not memories:
        raise ValueError("write_pairs: this model has no LoRA memory that is enabled")
    segments = of_pairs(tokenizer, rows)
    check_state(memories, state, len(rows))
    state = state or fresh_state(memories, len(rows))
    options = {"differentiable": differentiable, "progress": progress}
    written = {
        name: m.writer.write(model, name, segments, None, state, **options) for name, m in memories.items()
    }
    return state.replace(written)
