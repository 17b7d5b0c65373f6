"""Where an associative memory sits in a model: its tokens behind each segment, its matrices around the layers."""

from __future__ import annotations

import torch
from torch import nn

from ..config import chosen_layers
from ..core.memory import LayerMemory
from ..core.model import embedding_std, text_config
from ..core.schedule import Schedule
from ..core.state import Fields
from .config import AssociativeMemoryConfig
from .module import AssociativeLayer


class AssociativeMemory(LayerMemory):
    """The associative memory of a model (ARMT, 2407.04841): what a layer's matrix holds for a token is added to that
    layer's input, and what the layer gives out at the write tokens is written into the matrix when a segment ends.

    Attributes:
        layers: layer number, as a string, to `AssociativeLayer`.
        write_tokens: (n_tokens, hidden_size), stand behind every segment.
    """

    def __init__(
        self,
        config: AssociativeMemoryConfig,
        hidden_size: int,
        layers: list[int],
        embedding_std: float = 0.02,
    ):
        super().__init__(config)
        self.schedule, self.n_extra_tokens = Schedule.segments(config.segment_length), config.n_tokens
        self.at_layers = frozenset(layers)
        self.layers = nn.ModuleDict({str(layer): AssociativeLayer(config, hidden_size) for layer in layers})
        self.write_tokens = nn.Parameter(torch.randn(config.n_tokens, hidden_size) * embedding_std)

    @classmethod
    def for_model(cls, config: AssociativeMemoryConfig, model: nn.Module) -> AssociativeMemory:
        text = text_config(model)
        layers = chosen_layers(config.layers, text.num_hidden_layers)
        return cls(config, text.hidden_size, layers, embedding_std(model))

    def new_state(self, batch_size: int) -> Fields:
        """Fields `layers.3.matrix` (batch, n_features, hidden_size) and `layers.3.normalizer` (batch, n_features)."""
        fields = {}
        for key, layer in self.layers.items():
            fields[f"layers.{key}.matrix"], fields[f"layers.{key}.normalizer"] = layer.new_state(batch_size)
        return fields

    def write_inputs(self, fields: Fields) -> torch.Tensor:
        """Tokens to put after a segment, (batch, n_tokens, hidden_size)."""
        rows = len(next(iter(fields.values())))
        return self.write_tokens.expand(rows, -1, -1)

    def before_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Adds what the layer's matrix holds."""
        state = self._state(block, name, layer)
        return hidden + self.layers[str(layer)].read(hidden, *state).to(hidden.dtype)

    def after_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> None:
        """Writes what the layer gave out at the write tokens, in the rows that had a segment."""
        if not block.writes:
            return
        state = self._state(block, name, layer)
        written = self.layers[str(layer)].write(hidden[:, block.write_at[name]], *state)
        for field, old, new in zip(_fields(layer), state, written):
            active = block.active.view(-1, *[1] * (old.dim() - 1))
            block.put(name, {field: torch.where(active, new, old)})

    def _state(self, block, name: str, layer: int) -> tuple[torch.Tensor, ...]:
        """A and z of a layer before the block."""
        return tuple(block.fields[name][field] for field in _fields(layer))


def _fields(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.matrix", f"layers.{layer}.normalizer"
