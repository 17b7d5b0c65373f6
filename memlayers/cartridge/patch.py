"""Where a cartridge sits in a model: before the keys and values of every attention."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..config import ConfigError
from ..memory import Fields, Memory, embedding_std
from ..model import attention_of, decoder_layers, decoder_of, max_positions
from ..passes import Pass, carried
from ..state import MemoryState
from ..streaming import CACHE_NAMES
from ..writing import Writer
from .attention import KeysBefore, as_many_rows, mask_before
from .config import CartridgeConfig
from .start import keys_and_values, keys_and_values_of_prompt, keys_shapes


class Cartridge(Memory):
    """Keys and values of up to `n_tokens` places before the text, for each row of a batch its own.

    State, per row and layer: `layers.3.keys` and `layers.3.values` (batch, places, key-value heads, head_dim) float32,
    keys with their positions turned in, right-aligned; and `length` (batch,) int64, the places in use. A text's
    positions begin at `length`.

    Attributes:
        keys, values: (layers, n_tokens, heads, head_dim), where `start: learned` begins; else absent.
        prompt: (n_tokens, hidden_size), with `start: prompt`; else absent.
        writer: the `Writer`, which refines what stands there on a text.
    """

    in_layers = True
    signature = "keys"
    by_gradient = True

    def __init__(self, config: CartridgeConfig, n_layers: int, heads: int, head_dim: int, hidden_size: int):
        super().__init__(config)
        self.n_layers, self.heads, self.head_dim = n_layers, heads, head_dim
        if config.start == "learned":
            shape = n_layers, config.n_tokens, heads, head_dim
            self.keys, self.values = (nn.Parameter(0.02 * torch.randn(shape)) for _ in range(2))
        elif config.start == "prompt":
            self.prompt = nn.Parameter(torch.randn(config.n_tokens, hidden_size))
        self.writer = Writer(config.writer, 2 * n_layers, hidden_size)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    @classmethod
    def for_model(cls, config: CartridgeConfig, model: nn.Module) -> Cartridge:
        text = model.config.get_text_config(decoder=True)
        shapes = keys_shapes(model)
        if len(set(shapes)) > 1 or len(shapes) != text.num_hidden_layers:
            raise ConfigError(
                f"type: the layers of {type(model).__name__} have keys of different shapes (heads, head_dim), {shapes}, "
                "or share them; a cartridge needs keys and values of its own in every layer"
            )
        limit = max_positions(model)
        if limit is not None and config.n_tokens >= limit:
            raise ConfigError(
                f"n_tokens: {config.n_tokens} places before a text leave it none of the {limit} positions that "
                f"{type(model).__name__} has"
            )
        memory = cls(config, len(shapes), *shapes[0], text.hidden_size)
        if config.start == "prompt":
            memory.prompt.data *= embedding_std(model)
        return memory

    def install(self, model: nn.Module) -> list:
        self.base = _Base(decoder_of(model))
        handles = []
        for layer, block in enumerate(decoder_layers(decoder_of(model))):
            attention = attention_of(model, layer)
            handles.append(block.register_forward_pre_hook(_Carry(self, layer), with_kwargs=True))
            handles.append(
                attention.register_forward_pre_hook(_Prepend(self, layer, attention), with_kwargs=True)
            )
        return handles

    def new_state(self, batch_size: int) -> Fields:
        """What is learned, or no places."""
        if self.config.start == "prompt":
            one = keys_and_values_of_prompt(self.base.decoder, self.prompt)
            return {name: x.expand(batch_size, *x.shape[1:]) for name, x in one.items()}
        learned = self.config.start == "learned"
        places = self.config.n_tokens if learned else 0
        empty = self.like.new_zeros(self.n_layers, 0, self.heads, self.head_dim)
        keys, values = (self.keys, self.values) if learned else (empty, empty)
        fields = {"length": torch.full((batch_size,), places, device=keys.device)}
        for layer in range(self.n_layers):
            for part, tensors in (("keys", keys), ("values", values)):
                fields[f"layers.{layer}.{part}"] = tensors[layer].float().expand(batch_size, -1, -1, -1)
        return fields

    def positions(self, fields: Fields) -> torch.Tensor:
        return fields["length"]

    def write(self, model, name, input_ids, mask, state, **options) -> Fields:
        if self.config.start == "text" and state[name]["layers.0.keys"].shape[1] == 0:
            first = keys_and_values(model, input_ids, mask, self.config.n_tokens, options["differentiable"])
            state = MemoryState({**state.fields, name: first})
        lesson = self.writer.lesson(model, input_ids, mask)
        return self.writer.write(model, name, *lesson, state, **options)

    def check_state(self, fields: Fields, name: str) -> None:
        layers = {f"layers.{i}.{part}" for i in range(self.n_layers) for part in ("keys", "values")}
        expected = {"length", *layers}
        places = fields["layers.0.keys"].shape[1:2] if "layers.0.keys" in fields else None
        for field in sorted(set(fields) | expected):
            tensor = fields.get(field)
            shape = (*places, self.heads, self.head_dim) if places and field != "length" else ()
            if field not in expected or tensor is None or tuple(tensor.shape[1:]) != shape:
                told = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"memory {name!r}: field {field!r} of the state {told}; this memory has keys and values of "
                    f"{self.n_layers} layers, (batch, places, {self.heads}, {self.head_dim}), and length; the state was "
                    "written by another memory"
                )


class _Base:
    """The decoder that a prompt is read by; an object, so that it is no child of the memory and a deep copy of the model
    has the copied decoder."""

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder


class _Hook:
    """A hook of one layer; an object and not a closure, so that a deep copy of the model uses the copied memory."""

    def __init__(self, owner: Cartridge, layer: int):
        self.owner, self.layer = owner, layer

    def name(self, run: Pass | None) -> str | None:
        """The owner's name in the pass, where it takes part and has places."""
        name = run.name_of(self.owner) if run is not None else None
        return None if name is None or run.before[name]["layers.0.keys"].shape[1] == 0 else name


class _Carry(_Hook):
    """Before the layer: takes its keys and values from the state, outside of what gradient checkpointing runs twice."""

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict):
        run = kwargs.get("memory_pass")
        name = self.name(run)
        if name is None:
            return None
        hidden, *rest = args
        for part in ("keys", "values"):
            field = f"layers.{self.layer}.{part}"
            hidden, run.reads[name, field] = carried(block, hidden, run.before[name][field])
        return (hidden, *rest), kwargs


class _Prepend(_Hook):
    """Before the attention: puts them before those of the text."""

    def __init__(self, owner: Cartridge, layer: int, attention: nn.Module):
        super().__init__(owner, layer)
        known = inspect.signature(type(attention).forward).parameters
        self.cache_name = next(name for name in CACHE_NAMES if name in known)

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict):
        run = kwargs.get("memory_pass")
        name = self.name(run)
        if name is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        fields = (run.reads[name, f"layers.{self.layer}.{part}"] for part in ("keys", "values"))
        keys, values = (as_many_rows(x, hidden).to(hidden.dtype).transpose(1, 2) for x in fields)
        below, mask = kwargs.get(self.cache_name), kwargs.get("attention_mask")
        previous = 0 if below is None else below.get_seq_length(self.layer)
        key = name, id(mask), previous  # layers of one kind of attention share it
        if key not in run.masks:
            length = as_many_rows(run.before[name]["length"], hidden)
            longer = mask_before(mask, length, keys.shape[2], hidden, previous, attention.config)
            run.masks[key] = mask, longer  # held, so that no other mask gets its id
        before = KeysBefore(keys, values, below)
        return args, {**kwargs, self.cache_name: before, "attention_mask": run.masks[key][1]}
