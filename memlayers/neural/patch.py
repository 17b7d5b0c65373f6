"""Where neural memory sits in a model: before the attention of its layers, beside it, or in its context."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..config import chosen_layers
from ..memory import Fields, Memory
from ..model import attention_of, decoder_layers, decoder_of
from ..passes import Pass, carried
from .config import NeuralMemoryConfig
from .context import in_context
from .module import NeuralMemory


class NeuralMemories(Memory):
    """The neural memory of a model: one `NeuralMemory` a layer, each with a state of its own.

    * `mal`: h ← h + memory(norm(h)) before the layer (Titans section 4.3).
    * `mag`: the memory reads and writes the layer's input, and what it reads is added to what attention gives out
      (section 4.2; added to the residual stream, and not multiplied, so that zero leaves the model as it was).
    * `mac`: at each segment, what the memory holds for every token stands before that token in attention's context,
      with persistent tokens before all (section 4.1). Attention runs without and with them, and
      tanh(mix) blends the two; mix starts at 0. When a segment ends, the layer's output is written.

    Attributes:
        layers: layer number, as a string, to `LayerMemory`.
    """

    in_layers = True
    signature = "rule"

    def __init__(self, config: NeuralMemoryConfig, hidden_size: int, layers: list[int]):
        super().__init__(config)
        self.segment_length, self.sliding_window = config.segment_length, config.sliding_window
        self.layers = nn.ModuleDict({str(layer): LayerMemory(config, hidden_size) for layer in layers})

    @classmethod
    def for_model(cls, config: NeuralMemoryConfig, model: nn.Module) -> NeuralMemories:
        text = model.config.get_text_config(decoder=True)
        layers = chosen_layers(config.layers, text.num_hidden_layers)
        for layer in layers:
            attention_of(model, layer)
        return cls(config, text.hidden_size, layers)

    def install(self, model: nn.Module) -> list:
        blocks, handles = decoder_layers(decoder_of(model)), []
        for key in self.layers:
            block = blocks[int(key)]
            handles.append(block.register_forward_pre_hook(_BeforeLayer(self, key), with_kwargs=True))
            if self.config.placement != "mal":
                handles.append(_Attention(self, key, attention_of(model, int(key)), len(blocks)))
            if self.config.placement == "mac":
                handles.append(block.register_forward_hook(_AfterLayer(self, key), with_kwargs=True))
        return handles

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


class LayerMemory(nn.Module):
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


class _Hook:
    """A hook of one layer; an object and not a closure, so that a deep copy of the model uses the copied memory."""

    def __init__(self, owner: NeuralMemories, key: str):
        self.owner, self.key = owner, key

    @property
    def layer(self) -> LayerMemory:
        return self.owner.layers[self.key]

    def state(self, run: Pass | None) -> tuple[str | None, Fields]:
        """The owner's name in the pass under way and this layer's fields before it; (None, {}) when it takes no part."""
        name = run.name_of(self.owner) if run is not None else None
        return name, {} if name is None else self.owner.part(run.before[name], self.key)

    def write(self, inner: torch.Tensor, run: Pass, name: str, fields: Fields) -> torch.Tensor:
        """Write (and read) `inner` and leave the new fields in the pass."""
        try:
            read, new = self.layer.memory(inner, fields, run.mask)
        except ValueError as error:
            error.add_note(
                f"in the neural memory {name!r} of layer {self.key}; if it is NaN and the text is sound, inner steps "
                "were too large: lower theta_max"
            )
            raise
        after = run.after.setdefault(name, dict(run.before[name]))
        after.update({f"layers.{self.key}.{field}": tensor for field, tensor in new.items()})
        return read


class _BeforeLayer(_Hook):
    """Reads (and writes, but for `mac`) before the layer runs, outside of what gradient checkpointing runs twice."""

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict):
        run = kwargs.get("memory_pass")
        name, fields = self.state(run)
        if name is None:
            return None
        hidden, *rest = args
        inner = self.layer.normed(hidden)
        if self.owner.config.placement == "mac":
            read = self.layer.read_norm(self.layer.memory.read(inner, fields))
        else:
            read = self.write(inner, run, name, fields)
        read = read.to(hidden.dtype)
        if self.owner.config.placement == "mal":
            return (hidden + read, *rest), kwargs
        hidden, run.reads[name, self.key] = carried(block, hidden, read)
        return (hidden, *rest), kwargs


class _AfterLayer(_Hook):
    """`mac`: writes what the layer gave out."""

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict, output) -> None:
        run = kwargs.get("memory_pass")
        name, fields = self.state(run)
        if name is not None and run.writes:
            hidden = output[0] if isinstance(output, tuple) else output
            self.write(self.layer.normed(hidden), run, name, fields)


class _Attention(_Hook):
    """Stands as `forward` on the attention of a layer and puts in what was read before the layer."""

    def __init__(self, owner: NeuralMemories, key: str, attention: nn.Module, n_layers: int):
        super().__init__(owner, key)
        self.attention, self.n_layers = attention, n_layers
        self.below = attention.__dict__.get("forward")
        attention.__dict__["forward"] = self

    def __call__(self, *args, memory_pass: Pass | None = None, **kwargs):
        base = self.below or type(self.attention).forward.__get__(self.attention)
        if isinstance(self.below, _Attention):
            base = partial(base, memory_pass=memory_pass)
        output = base(*args, **kwargs)
        name, _ = self.state(memory_pass)
        if name is None:
            return output
        read = memory_pass.reads[name, self.key]
        if self.owner.config.placement == "mag":
            return (output[0] + read, *output[1:])
        names = list(memory_pass.memories)
        place = (1 + names.index(name)) * self.n_layers + int(self.key)
        persistent = self.layer.persistent
        seen = in_context(
            base, args, kwargs, read, persistent, memory_pass.window, place, self.attention.config
        )
        blended = output[0] + torch.tanh(self.layer.mix).to(seen.dtype) * (seen - output[0])
        return (blended, *output[1:])

    def remove(self) -> None:
        """Give the attention its own forward back, or take this one out of the row of several."""
        above = self.attention.__dict__["forward"]
        if above is self:
            del self.attention.__dict__["forward"]
            if self.below is not None:
                self.attention.__dict__["forward"] = self.below
            return
        while above.below is not self:
            above = above.below
        above.below = self.below
