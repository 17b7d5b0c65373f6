"""Where a LoRA memory sits in a model: beside the linear layers of its decoder."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..config import ConfigError, chosen_layers
from ..core.hooks import PartHook
from ..core.memory import FLOATS, LayerMemory
from ..core.model import decoder_layers, decoder_of, text_config, without_adapters
from ..core.state import Fields
from ..writing import Writer
from .config import LoRAMemoryConfig
from .module import LoRAAdapter


class LoRAMemories(LayerMemory):
    """The LoRA memory of a model: one `LoRAAdapter` a linear layer. Its state is the adapters of each row.

    Attributes:
        adapters: name of the linear layer in the decoder, with - for the dots, to `LoRAAdapter`.
        writer: the `Writer`, which does the gradient steps.
    """

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
        hidden_size = text_config(model).hidden_size
        return cls(config, {name: widths(own) for name, (_, own) in found.items()}, hidden_size)

    def install(self, model: nn.Module) -> list:
        found = linear_layers(model, self.config)
        return [PartHook(self, module, layer_number(name), name) for name, (module, _) in found.items()]

    @property
    def gradient_writer(self) -> Writer:
        return self.writer

    def around(self, hook: PartHook, block, args: tuple, kwargs: dict):
        """Adds what each row's adapter makes of the layer's input."""
        output = hook.original(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        rows, n_tokens = block.mask.shape
        # MLA gives all tokens of the cache at once, row by row.
        if not (x.dim() > 2 and x.shape[0] == rows) and x.numel() != rows * n_tokens * x.shape[-1]:
            raise ValueError(
                f"{hook.part} was given {tuple(x.shape)} and not all of the {rows} × {n_tokens} tokens in their order, so that "
                "a LoRA memory does not know whose they are; leave it out of target_modules"
            )
        fields = block.fields[block.name_of(self)]
        a, b = fields[f"{hook.part}.lora_A"], fields[f"{hook.part}.lora_B"]
        return self.adapters[hook.part.replace(".", "-")](x, a, b, onto=output)

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
                or got.dtype not in FLOATS
            ):
                raise ValueError(
                    f"memory {name!r}: field {field!r} of the state has shape {tuple(got.shape)} of {got.dtype}, this memory needs "
                    f"{shape[width]} for {shape[rank]} (the rank, the same in both); it was written by another memory"
                )


def linear_layers(model: nn.Module, config: LoRAMemoryConfig) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The linear layers that `config` names, by their names in the decoder: what stands there, with all that PEFT has put
    around it, and the base's own. Adapters of PEFT are none, and, unless named, experts, whose tokens come without their
    rows.

    Raises:
        ConfigError: a name that no linear layer has; a layer that is not there.
    """
    decoder = decoder_of(model)
    blocks = decoder_layers(decoder)
    (stack,) = (name for name, child in decoder.named_children() if child is blocks)
    n_layers = len(blocks)
    layers = range(n_layers) if config.layers is None else chosen_layers(config.layers, n_layers)
    linear = {
        name: (around, own)
        for layer in layers
        for name, around, own in _parts(blocks[layer], f"{stack}.{layer}")
        if widths(own) is not None
    }
    if config.target_modules is None:
        return {name: modules for name, modules in linear.items() if ".experts." not in name}
    found = {n: m for n, m in linear.items() if any(_ends(n, end) for end in config.target_modules)}
    for i, end in enumerate(config.target_modules):
        if not any(_ends(name, end) for name in found):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"target_modules.{i}: no linear layer is called {end!r}; there are {', '.join(known)}"
            )
    return found


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """A module and all inside of it, by the names that the base has for them: what stands there and the base's own."""
    own = without_adapters(module)
    yield name, module, own
    for child_name, child in own.named_children():
        yield from _parts(child, f"{name}.{child_name}")


def layer_number(name: str) -> int:
    """The number of the layer that a part is in: the first number in its name."""
    return int(next(part for part in name.split(".") if part.isdigit()))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Width in and out of a linear layer, GPT-2's too; None for other modules, and for what an architecture makes of one, as
    some do for their routers."""
    if isinstance(module, nn.Linear) and "Router" not in type(module).__name__:
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.nx, module.nf
    return None
