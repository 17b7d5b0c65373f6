"""Where neural memory sits in a model: before the attention of its layers, beside it, or in its context."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ConfigError, chosen_layers
from ..core.hooks import PartHook, checkpoint_safe, part_hooks
from ..core.memory import LayerMemory
from ..core.model import attention_of, decoder_layers, decoder_of, text_config
from ..core.schedule import Schedule
from ..core.state import Fields
from .config import NeuralMemoryConfig
from .context import in_context
from .module import NeuralMemory


class NeuralMemories(LayerMemory):
    """The neural memory of a model: one `NeuralMemory` a layer, each with a state of its own.

    * `mal`: h ← h + memory(norm(h)) before the layer (Titans section 4.3).
    * `mag`: the memory reads and writes the layer's input, and what it reads is added to what attention gives out
      (section 4.2; added to the residual stream, and not multiplied, so that zero leaves the model as it was).
    * `mac`: at each segment, what the memory holds for every token stands before that token in attention's context,
      with persistent tokens before all (section 4.1). Attention runs without and with them, and
      tanh(mix) blends the two; mix starts at 0. When a segment ends, the layer's output is written.

    Attributes:
        layers: layer number, as a string, to `NeuralLayer`.
    """

    def __init__(self, config: NeuralMemoryConfig, hidden_size: int, layers: list[int]):
        super().__init__(config)
        segments = config.placement == "mac"
        self.schedule = (
            Schedule.segments(config.segment_length)
            if segments
            else Schedule.streaming(config.sliding_window)
        )
        self.at_layers = frozenset(layers)
        self.layers = nn.ModuleDict({str(layer): NeuralLayer(config, hidden_size) for layer in layers})

    @classmethod
    def for_model(cls, config: NeuralMemoryConfig, model: nn.Module) -> NeuralMemories:
        text = text_config(model)
        layers = chosen_layers(config.layers, text.num_hidden_layers)
        for layer in layers:
            attention = attention_of(model, layer)
            present = [hook.memory.config for hook in part_hooks(attention)]
            if config.placement == "mac" and any(getattr(c, "placement", None) == "mac" for c in present):
                raise ConfigError(f"layers: another memory already stands in the context of layer {layer}")
        return cls(config, text.hidden_size, layers)

    @property
    def state_kind(self) -> str:
        return f"{self.config.type} in placement {self.config.placement}"

    def install(self, model: nn.Module) -> list:
        if self.config.placement == "mal":
            return []
        self.n_layers = len(decoder_layers(decoder_of(model)))
        return [PartHook(self, attention_of(model, int(k)), int(k), "attention") for k in self.layers]

    def before_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Reads (and writes, but for `mac`) before the layer runs."""
        part = self.layers[str(layer)]
        inner = part.normed(hidden)
        if self.config.placement == "mac":
            fields = self.part(block.fields[name], str(layer))
            read = part.read_norm(part.memory.read(inner, fields))
        else:
            read = self._write(block, name, layer, inner)
        read = read.to(hidden.dtype)
        if self.config.placement == "mal":
            return hidden + read
        hidden, block.reads[name, str(layer)] = checkpoint_safe(block.call.layers[layer], hidden, read)
        return hidden

    def after_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> None:
        """`mac`: writes what the layer gave out."""
        if self.config.placement == "mac" and block.writes:
            self._write(block, name, layer, self.layers[str(layer)].normed(hidden))

    def around(self, hook: PartHook, block, args: tuple, kwargs: dict):
        """Puts in what was read before the layer."""
        output, name, part = hook.original(*args, **kwargs), block.name_of(self), self.layers[str(hook.layer)]
        read = block.reads[name, str(hook.layer)]
        whole = output if isinstance(output, tuple) else (output,)
        if self.config.placement == "mag":
            whole = (whole[0] + read, *whole[1:])
        else:
            config = text_config(block.call.decoder)
            place = (1 + list(block.call.memories).index(name)) * self.n_layers + hook.layer
            seen = in_context(hook, args, kwargs, read, part.persistent, block.window, place, config)
            blended = whole[0] + torch.tanh(part.mix).to(seen.dtype) * (seen - whole[0])
            whole = (blended, *whole[1:])
        return whole if isinstance(output, tuple) else whole[0]

    def _write(self, block, name: str, layer: int, inner: torch.Tensor) -> torch.Tensor:
        """Write (and read) `inner` and leave the new fields in the block."""
        fields = self.part(block.fields[name], str(layer))
        # Other memories' write tokens stand in every row, also in one that has no token here.
        mask = block.mask if block.active is None else block.mask & block.active[:, None]
        try:
            read, new = self.layers[str(layer)].memory(inner, fields, mask)
        except ValueError as error:
            error.add_note(
                f"in the neural memory {name!r} of layer {layer}; if it is NaN and the text is sound, inner steps "
                "were too large: lower theta_max"
            )
            raise
        block.put(name, {f"layers.{layer}.{field}": tensor for field, tensor in new.items()})
        return read

    def new_state(self, batch_size: int) -> Fields:
        """Fields of all layers, named `layers.3.weights.0` and so on; see `NeuralMemory.new_state`."""
        return {
            f"layers.{key}.{field}": tensor
            for key, layer in self.layers.items()
            for field, tensor in layer.memory.new_state(batch_size).items()
        }

    def check_state(self, fields: Fields, name: str) -> None:
        known = tuple(f"layers.{key}." for key in self.layers)
        strange = [field for field in fields if not field.startswith(known)]
        if strange:
            raise ValueError(
                f"memory {name!r}: the state has fields {sorted(strange)[:3]}, this memory is in layers "
                f"{', '.join(self.layers)}; it was written by another memory"
            )
        for key, layer in self.layers.items():
            layer.memory.check_state(self.part(fields, key), f"{name}.layers.{key}")

    def part(self, fields: Fields, key: str) -> Fields:
        """The fields of one layer."""
        start = f"layers.{key}."
        return {name.removeprefix(start): tensor for name, tensor in fields.items() if name.startswith(start)}


class NeuralLayer(nn.Module):
    """What one layer gets: a norm of the memory's own, the memory, and for `mac` what blends it in.

    Attributes:
        norm: RMSNorm before the memory.
        memory: the `NeuralMemory`.
        read_norm: RMSNorm of what stands in the context (`mac`).
        persistent: (n_persistent_tokens, hidden_size) tokens that stand before the context (`mac`).
        mix: (1,) before the tanh, starts at 0 (`mac`).
    """

    def __init__(self, config: NeuralMemoryConfig, hidden_size: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.memory = NeuralMemory(config, hidden_size)
        if config.placement == "mac":
            self.read_norm = nn.RMSNorm(hidden_size, eps=1e-6)
            self.persistent = nn.Parameter(torch.randn(config.n_persistent_tokens, hidden_size))
            self.mix = nn.Parameter(torch.zeros(1))
        else:
            nn.init.zeros_(self.memory.out_proj.weight)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's input as the memory takes it, in the memory's dtype."""
        return self.norm(hidden.to(self.norm.weight.dtype))
