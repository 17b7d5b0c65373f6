"""Where a LoRA memory sits in a model: beside the linear layers of its decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

from ..config import ConfigError, chosen_layers
from ..memory import Fields, Memory
from ..model import attention_of, decoder_layers, decoder_of
from ..passes import Pass
from ..writing import Writer
from .config import LoRAMemoryConfig
from .module import LoRAAdapter

RUNNING: ContextVar[Pass | None] = ContextVar("RUNNING", default=None)
"""The pass of the decoder layer that runs: linear layers get no keywords."""


class LoRAMemories(Memory):
    """The LoRA memory of a model: one `LoRAAdapter` a linear layer. Its state is the adapters of each row.

    Attributes:
        adapters: name of the linear layer in the decoder, with - for the dots, to `LoRAAdapter`.
        writer: the `Writer`, which does the gradient steps.
    """

    in_layers = True
    signature = "lora_A"
    by_gradient = True

    def __init__(self, config: LoRAMemoryConfig, targets: dict[str, tuple[int, int]], hidden_size: int):
        super().__init__(config)
        self.adapters = nn.ModuleDict(
            {
                name.replace(".", "-"): LoRAAdapter(*widths, config.r, config.lora_alpha)
                for name, widths in targets.items()
            }
        )
        self.writer = Writer(config.writer, 2 * len(targets), hidden_size)

    @classmethod
    def for_model(cls, config: LoRAMemoryConfig, model: nn.Module) -> LoRAMemories:
        found = linear_layers(model, config)
        hidden_size = model.config.get_text_config(decoder=True).hidden_size
        return cls(config, {name: widths(module) for name, module in found.items()}, hidden_size)

    def install(self, model: nn.Module) -> list:
        decoder = decoder_of(model)
        handles = []
        for layer, block in enumerate(decoder_layers(decoder)):
            handles.append(block.register_forward_pre_hook(_enter, with_kwargs=True))
            handles.append(
                attention_of(model, layer).register_forward_pre_hook(_enter_again, with_kwargs=True)
            )
            handles.append(block.register_forward_hook(_leave, always_call=True))
        for name, adapter in self.named_adapters():
            handles.append(decoder.get_submodule(name).register_forward_hook(_Add(self, name, adapter)))
        return handles

    def named_adapters(self) -> Iterator[tuple[str, LoRAAdapter]]:
        """The adapters by the names that their linear layers have in the decoder."""
        return ((key.replace("-", "."), adapter) for key, adapter in self.adapters.items())

    def new_state(self, batch_size: int) -> Fields:
        """Fields `<linear layer>.lora_A` (batch, r, in_features) and `.lora_B` (batch, out_features, r), float32."""
        fields = {}
        for name, adapter in self.named_adapters():
            fields[f"{name}.lora_A"], fields[f"{name}.lora_B"] = adapter.new_state(batch_size)
        return fields

    def write(self, model, name, input_ids, mask, state, **options) -> Fields:
        lesson = self.writer.lesson(model, input_ids, mask)
        return self.writer.write(model, name, *lesson, state, **options)

    def check_state(self, fields: Fields, name: str) -> None:
        expected = {
            f"{layer}.{field}": parameter.shape
            for layer, adapter in self.named_adapters()
            for field, parameter in (("lora_A", adapter.A), ("lora_B", adapter.B))
        }
        if set(fields) != set(expected):
            odd = sorted(set(fields) ^ set(expected))[:3]
            raise ValueError(
                f"memory {name!r}: the state and this memory adapt other layers, {', '.join(odd)} among them; it was "
                "written by another memory"
            )
        for field, shape in expected.items():
            width, rank = (1, 0) if field.endswith("lora_A") else (0, 1)
            got, other = fields[field], fields[field.replace("lora_B", "lora_A")]
            if (
                got.dim() != 3
                or got.shape[1 + width] != shape[width]
                or got.shape[1 + rank] != other.shape[1]
            ):
                raise ValueError(
                    f"memory {name!r}: field {field!r} of the state has shape {tuple(got.shape)}, this memory needs "
                    f"{shape[width]} for {shape[rank]} (the rank, the same in both); it was written by another memory"
                )


class _Add:
    """A forward hook of a linear layer; an object, so that a deep copy of the model adds the copied memory."""

    def __init__(self, owner: LoRAMemories, layer: str, adapter: LoRAAdapter):
        self.owner, self.layer, self.adapter = owner, layer, adapter

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor):
        run = RUNNING.get()
        name = run.name_of(self.owner) if run is not None else None
        if name is None:
            return None
        fields = run.before[name]
        a, b = fields[f"{self.layer}.lora_A"], fields[f"{self.layer}.lora_B"]
        return self.adapter(args[0], a, b, onto=output)


def _enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
    RUNNING.set(kwargs.get("memory_pass"))


def _enter_again(attention: nn.Module, args: tuple, kwargs: dict) -> None:
    """The same from the keywords that a layer hands to its attention: gradient checkpointing runs a layer's forward
    a second time without the hooks around it."""
    if "memory_pass" in kwargs:
        RUNNING.set(kwargs["memory_pass"])


def _leave(block: nn.Module, args: tuple, output) -> None:
    RUNNING.set(None)


def linear_layers(model: nn.Module, config: LoRAMemoryConfig) -> dict[str, nn.Module]:
    """The linear layers that `config` names, by their names in the decoder.

    Raises:
        ConfigError: a name that no linear layer has; a layer that is not there.
    """
    decoder = decoder_of(model)
    blocks = decoder_layers(decoder)
    (stack,) = (name for name, child in decoder.named_children() if child is blocks)
    n_layers = len(blocks)
    layers = range(n_layers) if config.layers is None else chosen_layers(config.layers, n_layers)
    linear = {
        f"{stack}.{layer}.{name}": module
        for layer in layers
        for name, module in blocks[layer].named_modules()
        if widths(module) is not None
    }
    if config.target_modules is None:
        return linear
    found = {n: m for n, m in linear.items() if any(_ends(n, end) for end in config.target_modules)}
    for i, end in enumerate(config.target_modules):
        if not any(_ends(name, end) for name in found):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"target_modules.{i}: no linear layer is called {end!r}; there are {', '.join(known)}"
            )
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Width in and out of a linear layer, GPT-2's too; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.nx, module.nf
    return None
