"""A shard of a bank: its manifest, its files, and the checks that they belong together and to a base.

manifest.json                what the shard is
adapter_model.safetensors    the adapter, with adapter_config.json as PEFT writes and reads them
documents.jsonl              the texts, from which the shard is trained again without one of them
router.safetensors           the vectors by which questions find it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from ..config import ConfigError, Strict, explain
from ..core.model import ROOT, decoder_of, unwrap
from ..core.state import Fields
from .bank_config import LoRABankConfig
from .store import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .patch import LoRAMemories

MANIFEST, ADAPTER, ADAPTER_CONFIG = "manifest.json", "adapter_model.safetensors", "adapter_config.json"
DOCUMENTS, ROUTER = "documents.jsonl", "router.safetensors"
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""
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


class ShardManifest(Strict):
    """What a shard is, as in its `manifest.json`.

    Attributes:
        name, group: of the shard; who may read the group may read the shard.
        documents: id to the sha256 of its text.
        created: when the shard was added or merged, ISO 8601.
        version: 1, and one more with each update.
        updated: id of each document that has been updated to the versions in which that happened.
        parent: sha256 of the adapter before the last update. None for a new shard, and after a document was forgotten.
        training: the config it was trained with; its `seed` again as `seed`.
        base: hash of the base it was trained on (`base_hash`).
        adapter, router: sha256 of adapter_model.safetensors and router.safetensors.
        r, lora_alpha, targets: of the adapter; targets are names of modules in the model.
    """

    name: str
    group: str
    documents: dict[str, str] = Field(min_length=1)
    created: str
    version: int = Field(1, ge=1)
    updated: dict[str, list[int]] = Field(default_factory=dict)
    parent: str | None = None
    training: LoRABankConfig
    seed: int
    base: str
    adapter: str
    router: str
    r: int
    lora_alpha: float
    targets: list[str]


def sha256(data: str | bytes) -> str:
    """Hex digest of bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


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
    return to_json(manifest.model_dump()).encode()


def read_manifest(folder: Path, name: str, group: str, base: str) -> ShardManifest:
    """The manifest of the shard that the bank has at `folder`, under `name` and for `group`.

    Raises:
        FileNotFoundError: it is not there.
        ConfigError: a field is wrong; names file and field.
        ValueError: it belongs to another shard, or to another base.
    """
    path = folder / MANIFEST
    try:
        manifest = ShardManifest.model_validate_json(_bytes(path))
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, ShardManifest, where=str(path))) from None
    for field, expected in (("name", name), ("group", group)):
        if getattr(manifest, field) != expected:
            raise ValueError(
                f"{path}: {field}: {getattr(manifest, field)!r} is not {expected!r}, as the bank has it; the folder "
                "was changed by hand or comes from another bank"
            )
    if manifest.base != base:
        raise ValueError(
            f"{path}: base: the adapter was trained on another base ({manifest.base[:12]}…) than the bank's "
            f"({base[:12]}…)"
        )
    return manifest


def read_adapter(folder: Path, manifest: ShardManifest, targets: Mapping[str, str], like: Fields) -> Fields:
    """The adapter of a shard as fields of a state without rows.

    Args:
        targets: as `targets_of` gives them.
        like: fields of one row, of whose shapes the adapter must be.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are not those of the manifest, or of another shape or rank.
    """
    path = folder / ADAPTER
    tensors = _tensors(path, manifest.adapter, "adapter")
    names = {
        f"{PEFT_PREFIX}{target}.lora_{x}.weight": f"{layer}.lora_{x}"
        for layer, target in targets.items()
        for x in "AB"
    }
    for name in sorted(names.keys() ^ tensors.keys()):
        told = "is missing" if name in names else f"is of no target in {MANIFEST}"
        raise ValueError(f"{path}: tensor {name!r} {told}; the adapter does not match its manifest")
    for name, field in names.items():
        if tensors[name].shape != like[field].shape[1:]:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, rank {manifest.r} in this base asks "
                f"for {tuple(like[field].shape[1:])}; the adapter does not match its manifest"
            )
    return {field: tensors[name] for name, field in names.items()}


def read_vectors(folder: Path, manifest: ShardManifest) -> torch.Tensor:
    """The router's vectors (n, d) of a shard, float32.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are not those of the manifest.
    """
    return _tensors(folder / ROUTER, manifest.router, "router")["vectors"]


def read_documents(folder: Path, manifest: ShardManifest) -> dict[str, str]:
    """The texts of a shard by id.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are not those of the manifest.
    """
    path = folder / DOCUMENTS
    try:
        lines = [json.loads(line) for line in _bytes(path).decode().split("\n") if line]
        texts = {line["id"]: line["text"] for line in lines}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is cut short or not a file of documents") from None
    found = {document: sha256(text) for document, text in texts.items()}
    if found != manifest.documents:
        odd = sorted(set(found.items()) ^ set(manifest.documents.items()))[0][0]
        raise ValueError(f"{path}: document {odd!r} is not as {MANIFEST} has it (its sha256 differs)")
    return texts


def _tensors(path: Path, expected: str, field: str) -> Fields:
    data = _bytes(path)
    if sha256(data) != expected:
        raise ValueError(
            f"{path}: its sha256 is {sha256(data)[:12]}…, {MANIFEST} says {field} {expected[:12]}…; the weights are cut "
            "short or do not belong to this manifest"
        )
    try:
        return tensors_from_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing; the shard is not whole") from None
