"""What a cartridge starts from: the keys and values of a text's first tokens, or of a learned prompt."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ConfigError
from ..core.masks import padding_last, positions_of
from ..core.model import decoder_of, device_of, eval_mode, new_cache, text_config, without_state
from ..core.state import Fields
from ..writing import right_aligned


def keys_and_values(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, n_tokens: int, differentiable: bool
) -> Fields:
    """The fields of a cartridge that holds the first `n_tokens` tokens of each row, read by the base alone.

    Args:
        input_ids: (batch, tokens).
        mask: (batch, tokens) bool, False at padding, which may stand anywhere.
        differentiable: keep the graph to the base's parameters.
    """
    device = device_of(model)
    input_ids, mask = input_ids.to(device), mask.to(device)
    order = padding_last(mask)[:, :n_tokens]
    ids, used = right_aligned(input_ids.gather(1, order), mask.gather(1, order))  # as the fields are
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        return _read(model, used, input_ids=ids)


def keys_and_values_of_prompt(model: nn.Module, prompt: torch.Tensor) -> Fields:
    """The fields, of one row, of a cartridge that holds embeddings (tokens, hidden_size), read by the base alone.

    They are those of every text behind the prompt, because the future does not reach the past.
    """
    used = torch.ones(1, len(prompt), dtype=torch.bool, device=prompt.device)
    dtype = model.get_input_embeddings().weight.dtype
    return _read(model, used, inputs_embeds=prompt.to(dtype)[None])


def _read(model: nn.Module, used: torch.Tensor, **inputs) -> Fields:
    decoder = decoder_of(model)
    cache = new_cache(decoder, whole=True)
    with without_state(model), eval_mode(decoder):  # in training checkpointing would keep no cache
        decoder(
            **inputs,
            attention_mask=used.long(),
            position_ids=positions_of(used),
            past_key_values=cache,
            use_cache=True,
        )
    fields = {"length": used.sum(1)}
    for i, layer in enumerate(cache.layers):
        if not hasattr(layer, "keys"):
            continue  # a layer without attention
        shared = getattr(text_config(model), "num_kv_shared_layers", 0)
        if layer.keys is None and not shared:
            continue
        if layer.keys is None:
            raise ConfigError(
                f"type: layer {i} of {type(model).__name__} reads the keys and values of another layer; a cartridge needs "
                "keys and values of its own in every attention"
            )
        fields[f"layers.{i}.keys"] = layer.keys.transpose(1, 2).float()
        fields[f"layers.{i}.values"] = layer.values.transpose(1, 2).float()
    return fields


def keys_shapes(model: nn.Module) -> dict[int, tuple[int, int, int]]:
    """(key-value heads, width of a key, of a value) of each layer with attention, by its number, as one token has them:
    configs name them in many ways.

    Raises:
        ConfigError: a layer that reads the keys of another one.
    """
    with torch.device(device_of(model)):  # also where a memory is only counted, see `core.size`
        one = torch.zeros(1, 1, dtype=torch.int64)
        fields = keys_and_values(model, one, one == 0, 1, differentiable=False)
    numbers = [int(field.split(".")[1]) for field in fields if field.endswith(".keys")]
    return {
        i: (*fields[f"layers.{i}.keys"].shape[2:], fields[f"layers.{i}.values"].shape[-1]) for i in numbers
    }
