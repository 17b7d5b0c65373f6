"""Where a cartridge sits in a model: before the keys and values of every attention."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ConfigError
from ..core.hooks import PartHook, checkpoint_safe
from ..core.memory import LayerMemory, check_field, check_range
from ..core.model import (
    attention_of,
    cache_name,
    embedding_std,
    max_positions,
    text_config,
)
from ..core.state import Fields
from ..writing import Writer
from .attention import KeysBefore, mask_before, shared
from .config import CartridgeConfig
from .start import keys_and_values, keys_and_values_of_prompt, keys_shapes


class Cartridge(LayerMemory):
    """Keys and values of up to `n_tokens` places before the text, for each row of a batch its own.

    State, per row and layer with attention: `layers.3.keys` and `layers.3.values` (batch, places, key-value heads, width of
    a key or a value) float32,
    keys with their positions turned in, right-aligned; and `length` (batch,) int64, the places in use. A text's
    positions begin at `length`.

    Attributes:
        keys, values: (layers with attention, n_tokens, heads, width), where `start: learned` begins; else absent.
        prompt: (n_tokens, hidden_size), with `start: prompt`; else absent.
        writer: the `Writer`, which refines what stands there on a text.
    """

    def __init__(
        self,
        config: CartridgeConfig,
        layers: list[int],
        heads: int,
        widths: tuple[int, int],
        hidden_size: int,
    ):
        super().__init__(config)
        self.heads, self.widths = heads, dict(zip(("keys", "values"), widths))
        self.at_layers = layers
        if config.start == "learned":
            self.keys, self.values = (
                nn.Parameter(0.02 * torch.randn(len(layers), config.n_tokens, heads, width))
                for width in widths
            )
        elif config.start == "prompt":
            self.prompt = nn.Parameter(torch.randn(config.n_tokens, hidden_size))
        self.writer = Writer(config.writer, 2 * len(layers), hidden_size)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    @classmethod
    def for_model(cls, config: CartridgeConfig, model: nn.Module) -> Cartridge:
        text = text_config(model)
        try:
            shapes = keys_shapes(model)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"type: {type(model).__name__} gives no keys and values in a cache of transformers ({error}); a cartridge "
                "needs them"
            ) from None
        if len(set(shapes.values())) != 1:
            raise ConfigError(
                f"type: the layers of {type(model).__name__} have keys and values of different shapes (heads, widths), "
                f"{shapes or 'or none at all'}; a cartridge needs the same in all of them"
            )
        limit = max_positions(model)
        if limit is not None and config.n_tokens >= limit:
            raise ConfigError(
                f"n_tokens: {config.n_tokens} places before a text leave it none of the {limit} positions that "
                f"{type(model).__name__} has"
            )
        heads, *widths = next(iter(shapes.values()))
        memory = cls(config, list(shapes), heads, tuple(widths), text.hidden_size)
        if config.start == "prompt":
            memory.prompt.data *= embedding_std(model)
        return memory

    def install(self, model: nn.Module) -> list:
        self.base = _Base(model)
        attentions = {layer: attention_of(model, layer) for layer in self.at_layers}
        for layer, attention in attentions.items():
            if cache_name(attention) is None:
                raise ConfigError(
                    f"type: the attention of layer {layer} of {type(model).__name__} takes no cache of keys and values, "
                    "before which a cartridge could stand"
                )
        return [PartHook(self, attention, layer, "attention") for layer, attention in attentions.items()]

    @property
    def gradient_writer(self) -> Writer:
        return self.writer

    def before_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Takes the layer's keys and values from the state, outside of what gradient checkpointing runs twice."""
        for part in ("keys", "values"):
            x = block.fields[name][f"layers.{layer}.{part}"]
            hidden, block.reads[name, f"{layer}.{part}"] = checkpoint_safe(
                block.call.layers[layer], hidden, x
            )
        return hidden

    def around(self, hook: PartHook, block, args: tuple, kwargs: dict):
        """Puts them before those of the text."""
        name, layer = block.name_of(self), hook.layer
        if block.reads[name, f"{layer}.keys"].shape[1] == 0:
            return hook.original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        parts = (
            shared(block.reads[name, f"{layer}.{part}"], block.call.cache.rows_per_state)
            for part in ("keys", "values")
        )
        keys, values = (x.to(hidden.dtype).transpose(1, 2) for x in parts)
        cache, mask = cache_name(hook.module), kwargs.get("attention_mask")
        below = kwargs.get(cache)
        previous = 0 if below is None else below.get_seq_length(layer)
        key = name, id(mask), previous  # layers of one kind of attention share it
        if key not in block.masks:
            length = shared(block.fields[name]["length"], block.call.cache.rows_per_state)
            config = text_config(block.call.decoder)
            longer = mask_before(mask, length, keys.shape[2], hidden, previous, config)
            block.masks[key] = mask, longer  # held, so that no other mask gets its id
        changed = {cache: KeysBefore(keys, values, below), "attention_mask": block.masks[key][1]}
        return hook.original(*args, **{**kwargs, **changed})

    def new_state(self, batch_size: int) -> Fields:
        """What is learned, or no places."""
        if self.config.start == "prompt":
            one = keys_and_values_of_prompt(self.base.model, self.prompt)
            return {name: x.expand(batch_size, *x.shape[1:]) for name, x in one.items()}
        learned = self.config.start == "learned"
        places = self.config.n_tokens if learned else 0
        fields = {"length": torch.full((batch_size,), places, device=self.like.device)}
        for i, layer in enumerate(self.at_layers):
            for part, width in self.widths.items():
                one = getattr(self, part)[i] if learned else self.like.new_zeros(0, self.heads, width)
                fields[f"layers.{layer}.{part}"] = one.float().expand(batch_size, -1, -1, -1)
        return fields

    def positions(self, fields: Fields) -> torch.Tensor:
        return fields["length"]

    def state_to_try(self, model: nn.Module, input_ids: torch.Tensor) -> Fields:
        if self.config.start != "text":
            return self.new_state(len(input_ids))
        return keys_and_values(model, input_ids, torch.ones_like(input_ids).bool(), 1, differentiable=False)

    def write(self, model, name, input_ids, mask, state, **options) -> Fields:
        if self.config.start == "text" and state[name][f"layers.{self.at_layers[0]}.keys"].shape[1] == 0:
            first = keys_and_values(model, input_ids, mask, self.config.n_tokens, options["differentiable"])
            state = state.replace({name: first})
        lesson = self.writer.lesson(model, input_ids, mask)
        return self.writer.write(model, name, *lesson, state, **options)

    def check_state(self, fields: Fields, name: str) -> None:
        layers = {f"layers.{i}.{part}" for i in self.at_layers for part in self.widths}
        expected, first = {"length", *layers}, f"layers.{self.at_layers[0]}.keys"
        if odd := sorted(set(fields) ^ expected):
            raise ValueError(
                f"memory {name!r}: field {odd[0]!r} of the state is {'one too much' if odd[0] in fields else 'missing'}; this "
                f"memory has keys and values of {len(self.at_layers)} layers, and length; the state was written by another "
                "memory"
            )
        check_field(name, "length", fields["length"], ("batch",), torch.int64)
        places = fields[first].shape[1] if fields[first].dim() == 4 else None
        for field in sorted(layers):
            shape = ("batch", places, self.heads, self.widths[field.rpartition(".")[2]])
            check_field(name, field, fields[field], shape, torch.float32)

    def check_numbers(self, fields: Fields, name: str) -> None:
        places = fields[f"layers.{self.at_layers[0]}.keys"].shape[1]
        check_range(name, "length", fields["length"], places)


class _Base:
    """The model that a prompt is read by; an object, so that it is no child of the memory and a deep copy of the model
    has the copied one."""

    def __init__(self, model: nn.Module):
        self.model = model
