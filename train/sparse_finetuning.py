"""Sparse memory finetuning (2510.15103): only the slots that the new data reads and other text does not may change.

Slots are ranked by TF-IDF (section 3.2): how often the batch of this step reads a slot, against in how many batches
of a background text the slot was read before training began:

    tf-idf(slot) = reads(slot) / Σ reads · log((n_batches + 1) / (batches that read slot + 1))
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import nn

from memlayers.core.usage import reads_of_tables, track_usage
from memlayers.optim import coalesce_rows

from .config import SparseFinetuningSection, TrainConfig
from .data_config import TextData
from .sources import make_source


class SparseFinetuning:
    """Chooses in every step the `top_t` slots of each table that may change.

    Args:
        model: with memories that have tables, on its device.
        config: its `sparse_finetuning` section, and the run's batch size and seed.
        tables: the value tables that learn, by name, with row-sparse gradients.

    Attributes:
        frequency: table name → (n_slots,) int64, the background batches that read each slot.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, tokenizer, tables: dict[str, nn.Parameter], device
    ):
        self.model, self.tables, self.section = model, tables, config.sparse_finetuning
        self.frequency = background_frequency(model, config, tokenizer, device)
        self._stack = ExitStack()
        self._usage = self._stack.enter_context(track_usage(model))

    def keep_top_slots(self, accelerator: Accelerator) -> None:
        """Drop the rows of the tables' gradients that are not among the `top_t`; call it after every backward
        pass of a step. All processes choose alike, by the reads of all."""
        for counter in self._usage.values():
            counter.merge()
        for name, reads in reads_of_tables(self.model, self._usage).items():
            table = self.tables[name]
            if table.grad is None:
                continue
            chosen = top_slots(reads, self.frequency[name], self.section)
            gradient = coalesce_rows(table.grad)
            rows = gradient.indices()[0]
            kept = chosen[rows]
            table.grad = torch.sparse_coo_tensor(
                rows[kept][None],
                gradient.values()[kept],
                table.shape,
                is_coalesced=True,
                check_invariants=False,
            )
        for counter in self._usage.values():
            counter.clear()

    def close(self) -> None:
        """Stop counting reads."""
        self._stack.close()


def top_slots(reads: torch.Tensor, frequency: torch.Tensor, section: SparseFinetuningSection) -> torch.Tensor:
    """(n_slots,) bool: the at most `top_t` slots with the highest TF-IDF, among those that were read."""
    idf = torch.log((section.n_batches + 1) / (frequency + 1.0))
    score = reads / reads.sum().clamp(min=1) * idf
    best = score.topk(min(section.top_t, len(score)))
    chosen = torch.zeros_like(reads, dtype=torch.bool)
    chosen[best.indices[best.values > 0]] = True
    return chosen


@torch.no_grad()
def background_frequency(model: nn.Module, config: TrainConfig, tokenizer, device) -> dict[str, torch.Tensor]:
    """In how many of `n_batches` batches of the background text each slot was read, by table.

    Raises:
        ConfigError: a file that is not there or too short; names it.
    """
    section = config.sparse_finetuning
    text = TextData(files=section.files, length=section.length)
    changes = {"data": text, "batch_size": section.batch_size}
    source = make_source(config.model_copy(update=changes), tokenizer, None)
    training, frequency = model.training, {}
    model.eval()
    with track_usage(model) as usage:
        for position in tqdm(range(section.n_batches), desc="background", mininterval=1.0):
            batch = source.batch(position).to(device)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            for name, reads in reads_of_tables(model, usage).items():
                seen = (reads > 0).long()
                frequency[name] = frequency[name] + seen if name in frequency else seen
            for counter in usage.values():
                counter.clear()
    model.train(training)
    return frequency
