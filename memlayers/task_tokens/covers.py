"""What stands on a model's own parts once it has task tokens: its embedding, its head, its loss."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from ..core.hooks import MethodOverride
from ..core.memory import Memory


class Embedding(MethodOverride):
    """`forward` of the input embedding: ids behind the base's are looked up in the memory's rows."""

    def __init__(self, memory: Memory, module: nn.Module):
        super().__init__(module, "forward")
        self.memory = memory

    def call(self, *args, **kwargs) -> torch.Tensor:
        memory, input_ids = self.memory, args[0] if args else kwargs["input"]
        if not memory.enabled or not memory.rows.n_places:
            return self.original(input_ids)
        memory.check_size(self.module)
        if memory.rows.free or not input_ids.is_cuda:  # to look is to wait, on a GPU
            memory.check_ids(input_ids)
        new = input_ids >= memory.first_id
        base = self.original(input_ids.masked_fill(new, 0))
        rows = memory.rows.read((input_ids - memory.first_id).clamp(min=0), like=base)
        return torch.where(new[..., None], rows * embed_scale(self.module), base)


def embed_scale(embedding: nn.Module) -> torch.Tensor | float:
    """What an embedding multiplies its rows by, in their dtype; Gemma's does, most do not."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(embedding.weight.dtype) if isinstance(scale, torch.Tensor) else scale


class Head(MethodOverride):
    """`forward` of the head: logits of the memory's rows behind the base's."""

    def __init__(self, memory: Memory, module: nn.Module):
        super().__init__(module, "forward")
        self.memory = memory

    def call(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.original(hidden)
        if not self.memory.enabled or not self.memory.rows.n_places:
            return logits
        return torch.cat([logits, self.memory.rows.logits(hidden).to(logits.dtype)], dim=-1)


class Loss(MethodOverride):
    """The loss of the model, told how many logits there are and not how many the base has."""

    def __init__(self, model: nn.Module):
        self.loss = model.loss_function  # a property, which takes what stands on the instance
        super().__init__(model, "_loss_function")

    def original(self, *args, **kwargs):
        return self.loss(*args, **kwargs)

    def call(self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None, **kwargs):
        return self.original(logits, labels, vocab_size=logits.shape[-1], **kwargs)


class Resize(MethodOverride):
    """`resize_token_embeddings` of the model: the procedures move behind the base's new last row."""

    def __init__(self, memory: Memory, model: nn.Module, hooks: list[MethodOverride]):
        super().__init__(model, "resize_token_embeddings")
        self.memory, self.hooks = memory, hooks

    def call(self, *args, **kwargs):
        for hook in self.hooks:
            if hook is not self:
                hook.remove()
        try:
            return self.original(*args, **kwargs)
        finally:
            self.hooks[:] = [self, *self.memory.sit_on(self.module)]


class TransitionScores(MethodOverride):
    """`compute_transition_scores` of `generate`'s output, which else would count by the base's vocabulary."""

    def __init__(self, model: nn.Module):
        super().__init__(model, "compute_transition_scores")

    def call(self, sequences, scores, *args, **kwargs):
        text = SimpleNamespace(vocab_size=scores[0].shape[-1])
        counting = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
        return type(self.module).compute_transition_scores(counting, sequences, scores, *args, **kwargs)
