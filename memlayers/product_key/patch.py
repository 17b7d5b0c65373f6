"""Where product-key memory sits in a model: beside the MLP of its layers, or in their place."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ConfigError, chosen_layers
from ..core.hooks import PartHook, part_hooks
from ..core.memory import Memory
from ..core.model import mlp_of, text_config
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
        text = text_config(model)
        layers = chosen_layers(config.layers, text.num_hidden_layers)
        for layer in layers:
            if config.placement == "replace" and _is_replaced(mlp_of(model, layer)[1]):
                raise ConfigError(
                    f"layers: another memory already takes the place of the MLP of layer {layer}"
                )
        return cls(config, text.hidden_size, layers)

    def install(self, model: nn.Module) -> list:
        hooks = []
        for layer in map(int, self.layers):
            first, last = mlp_of(model, layer)
            if first is not last:  # an MLP that is no module: what comes in is kept until it goes out
                hooks.append(PartHook(self, first, layer, "mlp input"))
            hooks.append(PartHook(self, last, layer, "mlp"))
        return hooks

    def around(self, hook: PartHook, block, args: tuple, kwargs: dict):
        """What the MLP gives out with what the memory reads from its input, or that in its place."""
        x = args[0] if args else next(iter(kwargs.values()))
        if block is not None:
            place = block.name_of(self), f"mlp input {hook.layer}"
            if hook.part == "mlp input":
                block.reads[place] = x
                return hook.original(*args, **kwargs)
            x = block.reads.get(place, x)
        if self.config.placement == "replace":
            return self._read(hook.layer, x)
        output = hook.original(*args, **kwargs)
        whole = output if isinstance(output, tuple) else (output,)  # some give their router's logits out too
        read = self._read(hook.layer, x).view(whole[0].shape)  # and some have flattened the tokens
        return (whole[0] + read, *whole[1:]) if isinstance(output, tuple) else whole[0] + read

    def _read(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.layers[str(layer)](x, self.values)
        except ValueError as error:
            error.add_note(f"in the product-key memory of layer {layer}")
            raise

    def tables(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name.rsplit(".", 1)[-1] == "values"}

    def sparse_gradients(self, on: bool = True) -> None:
        for layer in self.layers.values():
            layer.sparse = on

    def check_tables_can_learn(self) -> str | None:
        for number, layer in self.layers.items():
            if layer.config.value_proj and not layer.value_proj.weight.any():
                return f"value_proj of {{name}}.layers.{number} is still 0, as it starts"
        return None

    def readers(self) -> dict[str, tuple[nn.Module, str]]:
        return {
            f"layers.{n}": (layer, f"layers.{n}.values" if self.values is None else "values")
            for n, layer in self.layers.items()
        }


def _is_replaced(mlp: nn.Module) -> bool:
    """Whether a memory stands in place of an MLP."""
    return any(getattr(hook.memory.config, "placement", None) == "replace" for hook in part_hooks(mlp))
