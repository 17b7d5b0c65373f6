"""EDoRA (2501.12067) on PEFT's DoRA layers: magnitude and direction apart, and of the direction an r × r matrix learned.

    W = m ∘ (W₀ + B R A · s) / ‖W₀ + B R A · s‖,    U_r Σ_r V_rᵀ the r largest singular values of W₀,

with B = U_r Σ_r and A = V_rᵀ frozen, R at zero and m at ‖W₀‖: r² + out_features numbers a layer, whatever its width. PEFT's
lora_A then holds R A, so that its forward, merge and unmerge are PEFT's own.

    model = get_peft_model(base, LoraConfig(r=16, use_dora=True, target_modules="all-linear"))
    edora(model)                       # train, then
    save_edora(model, folder)          # A, B, R and m, as model.save_pretrained does, with checksums
    load_edora(base, folder)           # goes on where it was; or, for any PEFT without us:
    bake(model).save_pretrained(folder)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..files import DamagedFile, file_checksum, read_tensors, reading, together, write_tensors
from ..files.tensors import check_finite

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Rotated(nn.Module):
    """A to R A. R: (r, r) parameter, starts at zero."""

    def __init__(self, r: int, like: torch.Tensor):
        super().__init__()
        self.R = nn.Parameter(torch.zeros(r, r, dtype=like.dtype, device=like.device))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.R @ a


def edora(model: PeftModel, adapter: str = "default") -> PeftModel:
    """Make the DoRA adapter of `model` an EDoRA one, in place; the model's output is the base's.

    Raises:
        ValueError: no such adapter; one without use_dora=True; one that is EDoRA already; a rank above a layer's width.
    """
    layers = list(_dora_layers(model, adapter))
    for name, layer in layers:
        r, weight = layer.r[adapter], _weight_of(layer)
        if parametrize.is_parametrized(layer.lora_A[adapter]):
            raise ValueError(f"adapter {adapter!r} is EDoRA already ({name})")
        if r > min(weight.shape):
            raise ValueError(f"r: {r} is more than the {min(weight.shape)} singular values of {name}")
    for _, layer in layers:
        lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
        u, s, vt = torch.linalg.svd(_weight_of(layer).float(), full_matrices=False)
        r = layer.r[adapter]
        with torch.no_grad():
            lora_a.weight.copy_(vt[:r])
            lora_b.weight.copy_(u[:, :r] * s[:r])
        parametrize.register_parametrization(lora_a, "weight", Rotated(r, lora_a.weight))
        lora_a.parametrizations.weight.original.requires_grad_(False)
        lora_b.weight.requires_grad_(False)
    return model


def bake(model: PeftModel, adapter: str = "default") -> PeftModel:
    """Make an EDoRA adapter a plain DoRA adapter, in place: lora_A is R A from here on. Outputs stay as they are."""
    for _, layer in _dora_layers(model, adapter):
        if parametrize.is_parametrized(layer.lora_A[adapter]):
            parametrize.remove_parametrizations(layer.lora_A[adapter], "weight", leave_parametrized=True)
        for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
            part.weight.requires_grad_(True)
    return model


def save_edora(model: PeftModel, folder: str | Path, adapter: str = "default") -> None:
    """Write an EDoRA adapter into `folder` in one step, in PEFT's format, with checksums.

    Raises:
        ValueError: no such adapter; a number that is not finite.
        OSError: the disk is full, say; what was there before is as it was.
    """
    from peft import get_peft_model_state_dict

    list(_dora_layers(model, adapter))
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    with together(folder) as change:
        model.peft_config[adapter].save_pretrained(str(change.new))
        recorded = {"format": "pt", CONFIG: file_checksum(change.new / CONFIG)}
        write_tensors(change.new / WEIGHTS, tensors, recorded)


def load_edora(
    base: PreTrainedModel, folder: str | Path, adapter: str = "default", *, verify: bool = True
) -> PeftModel:
    """`base` with the EDoRA adapter that `save_edora`, or PEFT's `save_pretrained`, wrote, ready to learn on.

    Args:
        verify: compare the checksums, where there are any: PEFT writes none; False takes what is there.

    Raises:
        FileNotFoundError: no adapter_model.safetensors or adapter_config.json in `folder`.
        ValueError: a file is damaged; the adapter is another kind or of another base.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    path, config_path = Path(folder) / WEIGHTS, Path(folder) / CONFIG
    for each in (path, config_path):
        if not each.is_file():
            raise FileNotFoundError(f"no adapter at {each}")
    with reading(folder):
        tensors, metadata = read_tensors(path, verify=verify, required=False)
        if verify and metadata.get(CONFIG, found := file_checksum(config_path)) != found:
            raise DamagedFile(
                f"{config_path} is not as it was written with {path.name}; take a copy that is whole, or read it with verify=False"
            )
        config = PeftConfig.from_pretrained(str(folder))
    check_finite(path, tensors)
    if whole := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise DamagedFile(f"{path}: tensor {whole[0]!r} has numbers of {tensors[whole[0]].dtype}, not floats")
    if not any(name.endswith(".R") for name in tensors):
        raise ValueError(f"{path} is no EDoRA adapter; load it with peft.PeftModel.from_pretrained")
    config.inference_mode = False
    model = edora(get_peft_model(base, config, adapter_name=adapter), adapter)
    try:
        found = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    except RuntimeError as error:  # of other shapes
        raise ValueError(f"{path} does not fit this base: {str(error).splitlines()[-1].strip()}") from None
    missing = [name for name in found.missing_keys if f".{adapter}." in name and "lora_" in name]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{path} does not fit this base: {sorted(missing + found.unexpected_keys)[:3]} and so on"
        )
    return model


def _dora_layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.lora import LoraLayer

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
    if not found:
        raise ValueError(f"this model has no LoRA adapter called {adapter!r}")
    for name, layer in found:
        if adapter not in getattr(layer, "lora_magnitude_vector", {}):
            raise ValueError(
                f"adapter {adapter!r} has no magnitudes ({name}); make it with LoraConfig(use_dora=True)"
            )
        yield name, layer


def _weight_of(layer: nn.Module) -> torch.Tensor:
    """W₀ (out_features, in_features)."""
    weight = layer.get_base_layer().weight
    return weight.T if layer.fan_in_fan_out else weight
