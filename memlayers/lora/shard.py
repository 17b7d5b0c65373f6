"""A shard of a bank: its manifest, its files, and the checks that they belong together and to a base.

manifest.json                what the shard is
adapter_model.safetensors    the adapter, with adapter_config.json as PEFT writes and reads them
documents.jsonl              the texts, from which the shard is trained again without one of them
router.safetensors           the vectors by which questions find it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from ..core.model import PEFT_PREFIX, ROOT, decoder_of, unwrap
from ..core.state import Fields
from ..files import DamagedFile
from .bank_config import LoRABankConfig
from .folders import plain_bytes, read_file
from .index import (
    ADAPTER,
    DOCUMENTS,
    ROUTER,
    BankIndex,
    Files,
    ShardEntry,
    ShardFacts,
    folder_of,
    sha256,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .patch import LoRAMemories

OF_A_RUN = {
    "_name_or_path",
    "architectures",
    "dtype",
    "keys_to_ignore_at_inference",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a model's config that say how it was loaded or is called, not what it computes."""


class ShardManifest(ShardFacts):
    """What a shard is, as in its `manifest.json`; `ShardFacts` has the fields that differ with each shard.

    Attributes:
        name: of the shard.
        training: the config it was trained with; its `seed` again as `seed`.
        base: hash of the base it was trained on (`base_hash`).
        adapter, router: sha256 of adapter_model.safetensors and router.safetensors.
        r, lora_alpha, targets: of the adapter; targets are names of modules in the model.
    """

    name: str
    training: LoRABankConfig
    seed: int
    base: str
    adapter: str
    router: str
    r: int
    lora_alpha: float
    targets: list[str]


def manifest_of(index: BankIndex, name: str) -> ShardManifest:
    """The manifest of a shard, from what `bank.json` has of it."""
    entry = index.shards[name]
    return ShardManifest(
        name=name,
        training=index.config,
        seed=index.config.seed,
        base=index.base,
        adapter=entry.files[ADAPTER],
        router=entry.files[ROUTER],
        r=index.r,
        lora_alpha=index.lora_alpha,
        targets=index.targets,
        **facts_of(entry),
    )


def entry_of(manifest: ShardManifest, files: Files) -> ShardEntry:
    """What `bank.json` has of a shard."""
    return ShardEntry(
        folder=folder_of(manifest.name, files),
        files={file: sha256(files[file]) for file in sorted(files)},
        **facts_of(manifest),
    )


def facts_of(shard: ShardFacts) -> dict[str, Any]:
    """The fields that `bank.json` and the manifest share."""
    return {field: getattr(shard, field) for field in ShardFacts.model_fields}


def base_hash(model: PreTrainedModel) -> str:
    """sha256 over the config of a base and the names, shapes and dtypes of its tensors, memories left out."""
    model = unwrap(model)
    config = {k: v for k, v in model.config.to_dict().items() if k not in OF_A_RUN}
    tensors = [
        (name, list(x.shape), str(x.dtype))
        for name, x in sorted(model.state_dict().items())
        if not name.startswith(f"{ROOT}.")
    ]
    return sha256(json.dumps([config, tensors], sort_keys=True, default=str))


def targets_of(model: PreTrainedModel, memory: LoRAMemories) -> dict[str, str]:
    """Layer as the fields of a state name it to the name of the linear layer in the model, by which PEFT knows it."""
    model, decoder = unwrap(model), decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return {layer: f"{prefix}.{layer}" for layer, _ in sorted(memory.named_adapters())}


def adapter_bytes(fields: Fields, targets: Mapping[str, str]) -> bytes:
    """The fields of an adapter, without rows, under PEFT's names in the safetensors format."""
    tensors = {
        f"{PEFT_PREFIX}{target}.lora_{x}.weight": fields[f"{layer}.lora_{x}"].contiguous()
        for layer, target in targets.items()
        for x in "AB"
    }
    return bytes_from_tensors(tensors, metadata={"format": "pt"})


def adapter_config_bytes(model: PreTrainedModel, memory: LoRAMemories, targets: Mapping[str, str]) -> bytes:
    """What `peft.LoraConfig.save_pretrained` writes, its targets in one order (it writes those of a set)."""
    from peft import LoraConfig  # takes seconds to import

    model, config = unwrap(model), memory.config
    first = model.get_submodule(next(iter(targets.values())))
    alpha = config.lora_alpha
    peft_config = LoraConfig(
        r=config.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(targets.values()),
        fan_in_fan_out=type(first).__name__ == "Conv1D",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path or None,
        inference_mode=True,
    )
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in peft_config.to_dict().items()}
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def documents_bytes(texts: Mapping[str, str]) -> bytes:
    """The texts, one JSON object a line, in the order of their ids."""
    lines = [json.dumps({"id": d, "text": texts[d]}, ensure_ascii=False) + "\n" for d in sorted(texts)]
    return "".join(lines).encode()


def router_bytes(vectors: torch.Tensor) -> bytes:
    """The vectors (n, d), float32, by which questions find the shard, in the order of the documents' ids."""
    return bytes_from_tensors({"vectors": vectors.contiguous()})


def manifest_bytes(manifest: ShardManifest) -> bytes:
    """`manifest.json`."""
    fields = {"name": manifest.name, **manifest.model_dump()}
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def parse_manifest(data: bytes) -> ShardManifest | None:
    """The manifest that a file holds; None where it holds none."""
    try:
        return ShardManifest.model_validate_json(data)
    except pydantic.ValidationError:
        return None


def read_adapter(folder: Path, entry: ShardEntry, targets: Mapping[str, str], like: Fields) -> Fields:
    """The adapter of a shard as fields of a state without rows.

    Args:
        targets: as `targets_of` gives them.
        like: fields of one row, of whose shapes the adapter must be.

    Raises:
        FileNotFoundError: the weights are not there.
        DamagedFile: they are not as they were written.
        ValueError: they are of another shape or rank than the memory.
    """
    path = folder / ADAPTER
    tensors = _tensors(folder, entry, ADAPTER)
    names = {
        f"{PEFT_PREFIX}{target}.lora_{x}.weight": f"{layer}.lora_{x}"
        for layer, target in targets.items()
        for x in "AB"
    }
    for name in sorted(names.keys() ^ tensors.keys()):
        told = "is missing" if name in names else "is of no target of the bank"
        raise ValueError(f"{path}: tensor {name!r} {told}; the adapter does not match the bank")
    for name, field in names.items():
        if tensors[name].shape != like[field].shape[1:]:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, the bank's memory asks for "
                f"{tuple(like[field].shape[1:])}; the adapter does not match the bank"
            )
    return {field: tensors[name] for name, field in names.items()}


def read_vectors(folder: Path, entry: ShardEntry) -> torch.Tensor:
    """The router's vectors (n, d) of a shard, float32; raises FileNotFoundError or DamagedFile."""
    return _tensors(folder, entry, ROUTER)["vectors"]


def whole_documents(folder: Path, entry: ShardEntry) -> dict[str, str]:
    """The texts of a shard by id, those only that are as they were written."""
    try:
        data = plain_bytes(folder, DOCUMENTS)
    except (OSError, DamagedFile):
        return {}
    found = {}
    for line in data.split(b"\n"):
        try:
            fields = json.loads(line)
            document, text = fields["id"], fields["text"]
            if sha256(text) == entry.documents[document]:
                found[document] = text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _tensors(folder: Path, entry: ShardEntry, name: str) -> Fields:
    data = read_file(folder, name, entry.files[name])
    try:
        return tensors_from_bytes(data)
    except SafetensorError as error:
        raise DamagedFile(f"{folder / name} is not a safetensors file ({error})") from None
