"""Training a reversible memory's compressor on text by itself, with its reconstruction loss alone."""

from __future__ import annotations

from statistics import mean

import torch
from transformers import get_cosine_schedule_with_warmup

from memlayers.config import Strict
from memlayers.limits import Count, Rate, Steps


class CompressorTraining(Strict):
    """Training of a compressor on segments of text.

    Attributes:
        steps: of AdamW, cosine to 0 after a tenth.
        batch_size: segments a step.
        learning_rate: the highest.
    """

    steps: Steps = 400
    batch_size: Count = 32
    learning_rate: Rate = 2e-2


def train_compressor(base, memory, seen: torch.Tensor, config, seed: int, bar=iter) -> float:
    """Train `memory` on random segments of `seen` (tokens,); the mean loss over the last tenth.

    config: with the fields of `CompressorTraining`. bar: shows the steps.
    """
    optimizer = torch.optim.AdamW(memory.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, config.steps // 10, config.steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    span = torch.arange(memory.schedule.reach)
    for _ in bar(range(config.steps)):
        starts = torch.randint(len(seen) - len(span) + 1, (config.batch_size, 1), generator=generator)
        ids = seen[starts + span]
        loss = memory.extra_loss(base, ids, torch.ones_like(ids, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return mean(losses[-max(1, len(losses) // 10) :])
