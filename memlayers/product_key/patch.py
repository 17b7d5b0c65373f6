"""Where product-key memory sits in a model: beside the MLP of its layers, or in their place."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ConfigError, chosen_layers
from ..memory import Memory
from ..model import memories, mlp_of
from .config import ProductKeyMemoryConfig
from .module import ProductKeyMemory, new_values


class ProductKeyMemories(Memory):
    """The product-key memory of a model: one `ProductKeyMemory` a layer, and the table that they share.

    Attributes:
        layers: layer number, as a string, to `ProductKeyMemory`.
        values: (n_keys², value_dim) parameter that all layers read; None where each has its own.
    """

    def __init__(self, config: ProductKeyMemoryConfig, hidden_size: int, layers: list[int]):
        super().__init__(config)
        self.values = new_values(config, hidden_size) if config.share_values else None
        self.layers = nn.ModuleDict(
            {
                str(layer): ProductKeyMemory(config, hidden_size, own_values=not config.share_values)
                for layer in layers
            }
        )

    @classmethod
    def for_model(cls, config: ProductKeyMemoryConfig, model: nn.Module) -> ProductKeyMemories:
        text = model.config.get_text_config(decoder=True)
        layers = chosen_layers(config.layers, text.num_hidden_layers)
        for layer in layers:
            mlp = mlp_of(model, layer)
            if config.placement == "replace" and isinstance(mlp.__dict__.get("forward"), _Replacement):
                raise ConfigError(
                    f"layers: another memory already takes the place of the MLP of layer {layer}"
                )
        return cls(config, text.hidden_size, layers)

    def install(self, model: nn.Module) -> list:
        handles = []
        for layer, memory in self.layers.items():
            mlp = mlp_of(model, int(layer))
            reader = _Reader(self, memory, f"layer {layer}")
            if self.config.placement == "beside":
                handles.append(mlp.register_forward_hook(reader, with_kwargs=True))
            else:
                handles.append(_Replacement(reader, mlp))
        return handles


class _Reader:
    """A forward hook of an MLP that adds what the memory reads from the MLP's input.

    An object and not a closure, so that a deep copy of the model reads the copied memory."""

    def __init__(self, owner: ProductKeyMemories, memory: ProductKeyMemory, where: str):
        self.owner, self.memory, self.where = owner, memory, where

    def read(self, args: tuple, kwargs: dict) -> torch.Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        try:
            return self.memory(x, self.owner.values)
        except ValueError as error:
            error.add_note(f"in the product-key memory of {self.where}")
            raise

    def __call__(self, mlp: nn.Module, args: tuple, kwargs: dict, output):
        if not self.owner.enabled:
            return output
        if isinstance(output, tuple):  # mixtures of experts give their router's logits out too
            return (output[0] + self.read(args, kwargs), *output[1:])
        return output + self.read(args, kwargs)


class _Replacement:
    """Stands as `forward` on an MLP: the memory reads, and the MLP is not computed while it is enabled."""

    def __init__(self, reader: _Reader, mlp: nn.Module):
        self.reader, self.mlp, self.below = reader, mlp, mlp.__dict__.get("forward")
        mlp.__dict__["forward"] = self

    def __call__(self, *args, **kwargs):
        if self.reader.owner.enabled:
            return self.reader.read(args, kwargs)
        return (self.below or type(self.mlp).forward.__get__(self.mlp))(*args, **kwargs)

    def remove(self) -> None:
        """Give the MLP its own forward back."""
        del self.mlp.__dict__["forward"]
        if self.below is not None:
            self.mlp.__dict__["forward"] = self.below


def product_key_memories(model: nn.Module) -> dict[str, ProductKeyMemories]:
    """The product-key memories of a model by name."""
    return {name: m for name, m in memories(model).items() if isinstance(m, ProductKeyMemories)}


def value_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """The value tables of a model, shared ones once, by their names in its state dict."""
    tables = {
        id(p) for m in product_key_memories(model).values() for n, p in m.named_parameters() if _is_table(n)
    }
    return {name: p for name, p in model.named_parameters() if id(p) in tables}


def sparse_gradients(model: nn.Module, on: bool = True) -> None:
    """Make the gradients of all value tables row-sparse (`torch.sparse_coo`), or dense again."""
    for memory in product_key_memories(model).values():
        for layer in memory.layers.values():
            layer.sparse = on


def _is_table(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "values"
