"""The config of the evaluation of a bank."""

from __future__ import annotations

from pydantic import Field, model_validator

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.limits import Count, Rate, Scale, Seed


class BankEvalConfig(Strict):
    """What is measured.

    Attributes:
        model: folder or hub id of a plain checkpoint.
        n_documents, facts_per_document: each document is a shard.
        n_deleted: documents that are deleted.
        memory: of a shard. The one LoRA has n_documents times its r, and the same lora_alpha / r.
        bank: how shards are trained and found; its `seed` gives way to `seeds`.
        one_learning_rate: of the one LoRA, whose best is another than a shard's.
        top_k: shards that are mixed.
        temperatures: held-out prompts are also asked with these in place of the bank's, with the first top_k above 1.
        seeds: of documents, training and what is deleted.
        batch_size: questions of a batch.
        resamples: of the bootstrap.
        note: for the report, how the settings were chosen.
    """

    model: str
    n_documents: Count = Field(40, ge=2)
    facts_per_document: int = Field(3, ge=1, le=5)
    n_deleted: Count = 10
    memory: ml.LoRAMemoryConfig = ml.LoRAMemoryConfig()
    bank: ml.LoRABankConfig = ml.LoRABankConfig()
    one_learning_rate: Rate = 5e-3
    top_k: list[Count] = Field([1, 2, 3], min_length=1)
    temperatures: list[Scale] = Field([])
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    batch_size: Count = 120
    resamples: int = Field(2000, ge=100, le=1_000_000)
    note: str = ""

    @model_validator(mode="after")
    def _fits_together(self):
        if self.n_deleted >= self.n_documents:
            raise ConfigError(f"n_deleted: {self.n_deleted} of {self.n_documents} documents leave none")
        for field in ("top_k", "seeds", "temperatures"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ConfigError(f"{field}: {values} names a value twice")
        if self.temperatures and max(self.top_k) == 1:
            raise ConfigError("temperatures: with a single shard there is nothing to weigh; put 2 into top_k")
        return self

    @property
    def one(self) -> ml.LoRAMemoryConfig:
        """The memory of the one LoRA."""
        n = self.n_documents
        return self.memory.model_copy(
            update={"r": n * self.memory.r, "lora_alpha": n * self.memory.lora_alpha}
        )
