"""EDoRA (2501.12067) on PEFT's DoRA layers: magnitude and direction apart, and of the direction an r × r matrix learned.

    W = m ∘ (W₀ + B R A · s) / ‖W₀ + B R A · s‖,    U_r Σ_r V_rᵀ the r largest singular values of W₀,

with B = U_r Σ_r and A = V_rᵀ frozen, R at zero and m at ‖W₀‖: r² + out_features numbers a layer, whatever its width. PEFT's
lora_A then holds R A, so that its forward, merge and unmerge are PEFT's own.

    model = get_peft_model(base, LoraConfig(r=16, use_dora=True, target_modules="all-linear"))
    edora(model)                       # train, then
    model.save_pretrained(folder)      # A, B, R and m
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

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


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


def load_edora(base: PreTrainedModel, folder: str | Path, adapter: str = "default") -> PeftModel:
    """`base` with the EDoRA adapter that `save_pretrained` wrote, ready to learn on.

    Raises:
        FileNotFoundError: no adapter_model.safetensors in `folder`.
        ValueError: the adapter is another kind or of another base.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    tensors = load_file(path)
    if not any(name.endswith(".R") for name in tensors):
        raise ValueError(f"{path} is no EDoRA adapter; load it with peft.PeftModel.from_pretrained")
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = edora(get_peft_model(base, config, adapter_name=adapter), adapter)
    found = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
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
