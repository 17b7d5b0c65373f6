"""Training of one shard of a bank: a LoRA adapter, from a start of its own, on the segments of its documents.

The same documents, name, config and model give the same bits: documents are taken in the order of their ids, and all
randomness comes from a generator that is seeded from the config's seed and the shard's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core.memory import fresh_state
from ..core.model import device_of, eval_mode, stateful
from ..core.state import Fields
from ..writing import Segments, of_text, row_losses
from .bank_config import LoRABankConfig
from .module import draw_a

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .patch import LoRAMemories


def train_shard(
    model: PreTrainedModel,
    memory: str,
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[str, str],
    name: str,
    config: LoRABankConfig,
    *,
    progress: bool = False,
) -> Fields:
    """Train the adapter of shard `name` on `documents`, with `model` as it stands and its base frozen.

    Args:
        model: has the LoRA memory `memory`, whose r, lora_alpha and targets the adapter takes.
        documents: id to text, each of two tokens at least.

    Returns:
        The fields of `memory`, float32 on the CPU and without rows: `<layer>.lora_A` (r, in_features) and
        `<layer>.lora_B` (out_features, r).

    Raises:
        ValueError: the loss or the adapter is not finite, named with the step and the shard; the memory is disabled.
    """
    if memory not in stateful(model):
        raise ValueError(f"memory {memory!r} is disabled; a shard is trained while its memory is on")
    owner: LoRAMemories = stateful(model)[memory]
    generator = torch.Generator().manual_seed(_seed(config.seed, name))
    device = device_of(model)
    segments = _segments(tokenizer, documents, config.segment_length)
    order = _minibatches(len(segments), config.batch_size, generator)
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        fields = {f: x.to(device).requires_grad_() for f, x in _start(owner, generator).items()}
        state = fresh_state(stateful(model), 1)
        optimizer = torch.optim.AdamW(
            fields.values(), lr=config.learning_rate, weight_decay=0.0, foreach=False
        )
        steps = tqdm(range(config.steps), unit="step", desc=f"shard {name}", disable=not progress)
        for step in steps:
            batch = _joined([segments[i] for i in next(order)])
            rows = {field: x[None] for field, x in fields.items()}
            loss = row_losses(model, batch, state.replace({memory: rows}))[0]
            if not loss.isfinite():
                raise _diverged(f"step {step + 1} of {config.steps}", name, f"the loss is {loss.item()}")
            gradients = torch.autograd.grad(loss, list(fields.values()))
            for x, gradient in zip(fields.values(), gradients):
                x.grad = gradient
            optimizer.step()
    if not all(x.isfinite().all() for x in fields.values()):
        raise _diverged(f"step {config.steps} of {config.steps}", name, "the adapter is no longer finite")
    return {field: x.detach().cpu() for field, x in fields.items()}


def _diverged(step: str, name: str, what: str) -> ValueError:
    return ValueError(
        f"{step} of training shard {name!r}: {what}; the bank is as it was. Lower learning_rate in LoRABankConfig"
    )


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def _start(owner: LoRAMemories, generator: torch.Generator) -> Fields:
    """A as PEFT draws it, B at zero."""
    fields = {}
    for layer, adapter in owner.named_adapters():
        a = torch.empty(adapter.A.shape, dtype=torch.float32)
        fields[f"{layer}.lora_A"] = draw_a(a, generator)
        fields[f"{layer}.lora_B"] = torch.zeros(adapter.B.shape, dtype=torch.float32)
    return fields


def _segments(tokenizer, documents: Mapping[str, str], segment_length: int) -> list[Segments]:
    """The segments of all documents, one by one, documents in the order of their ids."""
    found = []
    for document in sorted(documents):
        ids = torch.tensor([tokenizer(documents[document], verbose=False).input_ids])
        found += of_text(ids, torch.ones_like(ids, dtype=torch.bool), segment_length).one_by_one()
    return found


def _joined(segments: list[Segments]) -> Segments:
    """Single segments of one row as the segments of one row, padded to the longest."""
    lengths = [int(segment.mask.sum()) for segment in segments]
    width = max(lengths)
    parts = [
        torch.cat([nn.functional.pad(x[..., :n], (0, width - n)) for x, n in zip(field, lengths)], dim=1)
        for field in zip(*segments)
    ]
    return Segments(*parts)


def _minibatches(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Numbers below n, each once in every round, the rounds in orders of their own, without end."""
    while True:
        for part in torch.randperm(n, generator=generator).split(size):
            yield part.tolist()
