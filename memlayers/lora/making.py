"""Making one shard of a bank from its recipe: training, and all its files as bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import shard as files_of
from .bank_config import LoRABankConfig
from .index import ADAPTER, ADAPTER_CONFIG, DOCUMENTS, MANIFEST, ROUTER, Files, sha256
from .reader import lora_memory, shape_of
from .recipes import Recipe
from .router import Router
from .shard import ShardManifest
from .training import train_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_shard(
    model: PreTrainedModel,
    memory: str,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    router: Router,
    base: str,
    config: LoRABankConfig,
    *,
    kept: Files | None = None,
    progress: bool = False,
) -> tuple[ShardManifest, Files]:
    """Train a shard; its manifest and all its files. Nothing is written.

    Args:
        model, memory, tokenizer, config: as `train_shard` takes them.
        recipe: what the shard is made from.
        router: makes the vectors of its documents.
        base: hash of the model's base (`shard.base_hash`).
        kept: files of it that need not be made.

    Raises:
        ValueError: as in `train_shard`, and as in `Router.document`.
    """
    owner, texts, files = lora_memory(model, memory), recipe.texts, dict(kept or {})
    targets = files_of.targets_of(model, owner)
    if ADAPTER not in files:
        fields = train_shard(model, memory, tokenizer, texts, recipe.name, config, progress=progress)
        files[ADAPTER] = files_of.adapter_bytes(fields, targets)
    if ROUTER not in files:
        vectors = torch.cat([router.document(texts[document]) for document in sorted(texts)])
        files[ROUTER] = files_of.router_bytes(vectors)
    if ADAPTER_CONFIG not in files:
        files[ADAPTER_CONFIG] = files_of.adapter_config_bytes(model, owner, targets)
    files[DOCUMENTS] = files_of.documents_bytes(texts)
    manifest = ShardManifest(
        name=recipe.name,
        group=recipe.group,
        documents={document: sha256(texts[document]) for document in sorted(texts)},
        created=recipe.created,
        version=recipe.version,
        updated={document: recipe.updated[document] for document in sorted(recipe.updated)},
        parent=recipe.parent,
        training=config,
        seed=config.seed,
        base=base,
        adapter=sha256(files[ADAPTER]),
        router=sha256(files[ROUTER]),
        **shape_of(model, owner),
    )
    return manifest, {**files, MANIFEST: files_of.manifest_bytes(manifest)}
