"""Writing by gradient steps: an adapter a row, trained on the segments of its text.

    φ_{i+1} = φ_i − step(∇ Σ_rows loss(φ_i; segments of the row)),    φ = A and B of all layers

Rows do not see each other: each has its own adapter, its own mean loss, and its own moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..memory import Fields
from ..state import MemoryCache, MemoryState
from .config import WriterSection
from .segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .patch import LoRAMemories


def write(
    model: PreTrainedModel,
    memory: LoRAMemories,
    name: str,
    segments: Segments,
    state: MemoryState,
    *,
    progress: bool = False,
) -> Fields:
    """The fields of `memory` after `segments` are written into those of `state`. No gradient; `state` is unchanged.

    Raises:
        ValueError: the loss of a row is not finite; names the step and the row.
    """
    writer = memory.config.writer
    parts = segments.one_by_one() if writer.streaming else [segments]
    bar = tqdm(total=len(parts) * writer.steps, unit="step", desc="write", disable=not progress)
    with torch.inference_mode(False), torch.enable_grad():
        fields = {field: x.detach().clone() for field, x in state[name].items()}
        for part in parts:
            fields = _steps(model, name, part, state, fields, writer, bar)
    bar.close()
    return fields


def _steps(model, name: str, segments: Segments, state, fields: Fields, writer: WriterSection, bar) -> Fields:
    inner = _Inner(writer, list(fields.values()))
    for step in range(writer.steps):
        leaves = {field: x.detach().requires_grad_() for field, x in fields.items()}
        losses = row_losses(model, segments, MemoryState({**state.fields, name: leaves}))
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"step {step + 1} of {writer.steps} of writing: the loss of row {bad[0]} is {losses[bad[0]].item()}; "
                "nothing was written, the state is as it was. Lower writer.learning_rate or set writer.clip"
            )
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        fields = dict(zip(fields, inner.step(list(fields.values()), gradients)))
        bar.update()
    return fields


def row_losses(model: PreTrainedModel, segments: Segments, state: MemoryState) -> torch.Tensor:
    """(batch,) float32: mean cross-entropy of each row's learned tokens, read with its adapter; 0 where it has none."""
    rows, n_segments = segments.ids.shape[:2]
    device = model.get_input_embeddings().weight.device
    ids, mask, learned = (x.flatten(0, 1).to(device) for x in segments)
    cache = MemoryCache(state)
    cache.shared_by = n_segments
    logits = model(
        input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=False, write_memory=False
    ).logits
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    each, counted = (x.reshape(rows, -1) for x in (each, learned[:, 1:]))
    return (each * counted).sum(1) / counted.sum(1).clamp(min=1)


class _Inner:
    """The inner optimizer, element by element, so that rows stay apart."""

    def __init__(self, writer: WriterSection, tensors: list[torch.Tensor]):
        self.writer, self.n_steps = writer, 0
        self.first = [torch.zeros_like(x) for x in tensors]
        self.second = [torch.zeros_like(x) for x in tensors]

    def step(self, tensors, gradients) -> list[torch.Tensor]:
        self.n_steps += 1
        if self.writer.clip is not None:
            gradients = clipped(gradients, self.writer.clip)
        rate = self.writer.learning_rate
        if self.writer.optimizer == "sgd":
            return [x - rate * g for x, g in zip(tensors, gradients)]
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, gradients)]
        self.second = [0.999 * v + 0.001 * g * g for v, g in zip(self.second, gradients)]
        by_first, by_second = 1 - 0.9**self.n_steps, 1 - 0.999**self.n_steps
        return [
            x - rate * (m / by_first) / ((v / by_second).sqrt() + 1e-8)
            for x, m, v in zip(tensors, self.first, self.second)
        ]


def clipped(gradients, largest: float) -> list[torch.Tensor]:
    """Gradients (batch, ...) with each row's norm, over all of them, at most `largest`."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (largest / norms.clamp(min=1e-12)).clamp(max=1)
    return [g * scale[:, None, None] for g in gradients]
