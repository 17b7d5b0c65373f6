"""What a user of PEFT does in place of a LoRA memory: train an adapter on a text, and mix adapters in a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from memlayers.lora import LoRAMemories


def with_adapters(base: PreTrainedModel, memory: LoRAMemories, names: list[str]) -> PeftModel:
    """A copy of the Llama `base` with PEFT's adapters `names` where `memory` has its own, of its rank and scale."""
    config = LoraConfig(
        r=memory.config.r,
        lora_alpha=memory.config.lora_alpha,
        target_modules=[f"model.{key.replace('-', '.')}" for key in memory.adapters],
    )
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


@torch.no_grad()
def put(model: PeftModel, adapter: str, fields: Mapping[str, torch.Tensor], row: int = 0) -> None:
    """Copy a row of a memory's fields into the adapter."""
    for field, x in fields.items():
        layer, _, part = field.rpartition(".")
        module = model.base_model.model.model.get_submodule(layer)
        getattr(module, part)[adapter].weight.copy_(x[row])


def write_with_peft(
    model: PeftModel, memory: LoRAMemories, ids: torch.Tensor, labels: torch.Tensor
) -> list[float]:
    """Train the adapter `default` on one text, as `memory` writes it: its start, its steps of AdamW without decay.

    Args:
        ids: (segments, tokens) int64.
        labels: (segments, tokens) int64, -100 at tokens that are not predicted.

    Returns:
        The loss before each step.
    """
    put(model, "default", memory.new_state(1))
    writer = memory.config.writer
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=writer.learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(writer.steps):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mixed_batch(
    base: PreTrainedModel, memory: LoRAMemories, fields: Mapping[str, torch.Tensor]
) -> tuple[PeftModel, list[str]]:
    """A PEFT model with an adapter for each row of `fields`, and their names, as `adapter_names=` takes them."""
    rows = next(iter(fields.values())).shape[0]
    names = [f"row_{row}" for row in range(rows)]
    model = with_adapters(base, memory, names)
    for row, name in enumerate(names):
        put(model, name, fields, row)
    return model, names
