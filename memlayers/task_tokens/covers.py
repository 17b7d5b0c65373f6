"""What covers a model's own parts once it has task tokens: its embedding, its head, its loss.

Objects and not closures, so that a deep copy of the model uses the copied memory.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .patch import TaskTokens


class Cover:
    """Stands as an attribute of a module's instance until it is removed; `below` is what was there."""

    def __init__(self, memory: TaskTokens, module: nn.Module, name: str, below):
        self.memory, self.module, self.name, self.below = memory, module, name, below
        self.own = module.__dict__.get(name)
        module.__dict__[name] = self

    def remove(self) -> None:
        """Give the module back what it had."""
        del self.module.__dict__[self.name]
        if self.own is not None:
            self.module.__dict__[self.name] = self.own


class Embedding(Cover):
    """`forward` of the input embedding: ids behind the base's are looked up in the memory's rows."""

    def __init__(self, memory: TaskTokens, module: nn.Module):
        super().__init__(memory, module, "forward", module.forward)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        memory = self.memory
        if not memory.enabled or not memory.rows.n_places:
            return self.below(input_ids)
        if memory.rows.free or not input_ids.is_cuda:  # to look is to wait, on a GPU
            memory.check_ids(input_ids)
        new = input_ids >= memory.first_id
        base = self.below(input_ids.masked_fill(new, 0))
        rows = memory.rows.read((input_ids - memory.first_id).clamp(min=0), like=base)
        return torch.where(new[..., None], rows * embed_scale(self.module), base)


def embed_scale(embedding: nn.Module) -> torch.Tensor | float:
    """What an embedding multiplies its rows by, in their dtype; Gemma's does, most do not."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(embedding.weight.dtype) if isinstance(scale, torch.Tensor) else scale


class Head:
    """A forward hook of the head: logits of the memory's rows behind the base's."""

    def __init__(self, memory: TaskTokens):
        self.memory = memory

    def __call__(self, head: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor:
        if not self.memory.enabled or not self.memory.rows.n_places:
            return logits
        return torch.cat([logits, self.memory.rows.logits(args[0]).to(logits.dtype)], dim=-1)


class Loss(Cover):
    """The loss of the model, told how many logits there are and not how many the base has."""

    def __init__(self, memory: TaskTokens, model: nn.Module):
        super().__init__(memory, model, "_loss_function", model.loss_function)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None, **kwargs):
        return self.below(logits, labels, vocab_size=logits.shape[-1], **kwargs)


class TransitionScores(Cover):
    """`compute_transition_scores` of `generate`'s output, which else would count by the base's vocabulary."""

    def __init__(self, memory: TaskTokens, model: nn.Module):
        super().__init__(memory, model, "compute_transition_scores", None)

    def __call__(self, sequences, scores, *args, **kwargs):
        text = SimpleNamespace(vocab_size=scores[0].shape[-1])
        counting = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
        return type(self.module).compute_transition_scores(counting, sequences, scores, *args, **kwargs)
