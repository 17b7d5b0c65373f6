"""One forward pass of training: write, ask, weigh the losses."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from memlayers.core.model import memories, written_by_gradient
from memlayers.write import write

from .background import Background, divergence
from .data import ANSWER, CONTEXT, Batch


class Objective(nn.Module):
    """The loss of a batch, and how many answers were right.

    Regime D runs the model twice (context, then question and answer on the state alone). Both calls happen
    inside this module's one forward, so that DDP sees one forward before one backward.

    Args:
        model: with or without memories.
        weights: (part, weight) pairs of the loss, see `data.loss_weights`.
        by_item: count an item as right when all its answer tokens are the most likely ones; else count tokens.
        background: what else is to stay as the base has it, where a run has such a section.
        cycle: weight of the losses that memories have of their own for what is written, such as of reading it back.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[tuple[int, float]],
        by_item: bool,
        background: Background | None = None,
        cycle: float = 0.0,
    ):
        super().__init__()
        self.model, self.weights, self.by_item = model, weights, by_item
        self.background, self.cycle = background, cycle
        self.with_context = any(part == CONTEXT for part, _ in weights)

    def forward(self, batch: Batch, background: Batch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns: loss and accuracy, two float32 scalars; the accuracy has no gradient."""
        tail = batch.tail
        if batch.context_ids is not None:
            loss_of_context, state = self._write(batch)
            logits = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                memory_state=state,
                use_cache=False,
            ).logits
        else:
            loss_of_context = 0.0
            # One logit before the first token of the tail is needed too.
            keep = 0 if self.with_context or tail >= batch.input_ids.shape[1] else tail + 1
            logits = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                logits_to_keep=keep,
                use_cache=False,
            ).logits
        n = logits.shape[1] - 1
        logits, targets, parts = logits[:, :-1].float(), batch.input_ids[:, -n:], batch.parts[:, -n:]
        loss = loss_of_context + self._loss(logits, targets, parts, first=batch.parts[:, -n - 1 : -1])
        if background is not None:
            far = divergence(self.model, background, self.background.base)
            loss = loss + self.background.weight * far
        if self.cycle > 0:
            loss = loss + self.cycle * self._extra_loss(batch)
        return loss, self._accuracy(logits.detach(), targets, parts)

    def _extra_loss(self, batch: Batch) -> torch.Tensor:
        """The sum over the memories that have one."""
        ids, mask = batch.input_ids, batch.attention_mask
        if batch.context_ids is not None:
            ids, mask = batch.context_ids, batch.context_mask
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        losses = [memory.extra_loss(self.model, ids, mask) for memory in memories(self.model).values()]
        return sum(loss for loss in losses if loss is not None)

    def _write(self, batch: Batch):
        """The state after the context, and the context's own loss if it has a weight."""
        if written_by_gradient(self.model):
            options = {"attention_mask": batch.context_mask, "differentiable": torch.is_grad_enabled()}
            return 0.0, write(self.model, batch.context_ids, **options)
        output = self.model(
            input_ids=batch.context_ids,
            attention_mask=batch.context_mask,
            close_memory=True,
            logits_to_keep=0 if self.with_context else 1,
            use_cache=False,
        )
        if not self.with_context:
            return 0.0, output.memory_state
        ids = batch.context_ids
        mask = torch.ones_like(ids) if batch.context_mask is None else batch.context_mask
        parts = mask * CONTEXT
        loss = self._loss(output.logits[:, :-1].float(), ids[:, 1:], parts[:, 1:], first=parts[:, :-1])
        return loss, output.memory_state

    def _loss(self, logits, targets, parts, first) -> torch.Tensor:
        """Sum over the parts of weight × mean cross-entropy. A token after padding has nothing to predict it."""
        each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = each.new_zeros(())
        for part, weight in self.weights:
            chosen = (parts == part) & (first > 0)
            loss = loss + weight * (each * chosen).sum() / chosen.sum().clamp(min=1)
        return loss

    def _accuracy(self, logits, targets, parts) -> torch.Tensor:
        asked = parts == ANSWER
        right = logits.argmax(-1) == targets
        if self.by_item:
            return (right | ~asked).all(1).float().mean()
        return (right & asked).sum() / asked.sum().clamp(min=1)
