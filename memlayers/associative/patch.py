"""Where an associative memory sits in a model: its tokens behind each segment, its matrices around the layers."""

from __future__ import annotations

import torch
from torch import nn

from ..config import chosen_layers
from ..memory import Fields, Memory, embedding_std
from ..model import decoder_layers, decoder_of
from ..passes import Pass
from .config import AssociativeMemoryConfig
from .module import AssociativeLayer


class AssociativeMemory(Memory):
    """The associative memory of a model (ARMT, 2407.04841): what a layer's matrix holds for a token is added to that
    layer's input, and what the layer gives out at the write tokens is written into the matrix when a segment ends.

    Attributes:
        layers: layer number, as a string, to `AssociativeLayer`.
        write_tokens: (n_tokens, hidden_size), stand behind every segment.
    """

    in_layers = True
    signature = "normalizer"

    def __init__(
        self,
        config: AssociativeMemoryConfig,
        hidden_size: int,
        layers: list[int],
        embedding_std: float = 0.02,
    ):
        super().__init__(config)
        self.segment_length, self.n_extra_tokens = config.segment_length, config.n_tokens
        self.layers = nn.ModuleDict({str(layer): AssociativeLayer(config, hidden_size) for layer in layers})
        self.write_tokens = nn.Parameter(torch.randn(config.n_tokens, hidden_size) * embedding_std)

    @classmethod
    def for_model(cls, config: AssociativeMemoryConfig, model: nn.Module) -> AssociativeMemory:
        text = model.config.get_text_config(decoder=True)
        layers = chosen_layers(config.layers, text.num_hidden_layers)
        return cls(config, text.hidden_size, layers, embedding_std(model))

    def install(self, model: nn.Module) -> list:
        blocks, handles = decoder_layers(decoder_of(model)), []
        for key in self.layers:
            block = blocks[int(key)]
            handles.append(block.register_forward_pre_hook(_Read(self, key), with_kwargs=True))
            handles.append(block.register_forward_hook(_Write(self, key), with_kwargs=True))
        return handles

    def new_state(self, batch_size: int) -> Fields:
        """Fields `layers.3.matrix` (batch, n_features, hidden_size) and `layers.3.normalizer` (batch, n_features)."""
        fields = {}
        for key, layer in self.layers.items():
            fields[f"layers.{key}.matrix"], fields[f"layers.{key}.normalizer"] = layer.new_state(batch_size)
        return fields

    def write_inputs(self, state: Fields) -> torch.Tensor:
        """Tokens to put after a segment, (batch, n_tokens, hidden_size)."""
        rows = len(next(iter(state.values())))
        return self.write_tokens.expand(rows, -1, -1)


class _Hook:
    """A hook of one layer; an object and not a closure, so that a deep copy of the model uses the copied memory."""

    def __init__(self, owner: AssociativeMemory, key: str):
        self.owner, self.key = owner, key

    def state(self, run: Pass | None) -> tuple[str | None, tuple[torch.Tensor, ...]]:
        """The owner's name in the pass under way, and A and z before it; (None, ()) when it takes no part."""
        name = run.name_of(self.owner) if run is not None else None
        return name, () if name is None else tuple(run.before[name][field] for field in self.fields)

    @property
    def fields(self) -> tuple[str, str]:
        return f"layers.{self.key}.matrix", f"layers.{self.key}.normalizer"


class _Read(_Hook):
    """Adds what the memory holds to the layer's input."""

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict):
        name, state = self.state(kwargs.get("memory_pass"))
        if name is None:
            return None
        hidden, *rest = args
        read = self.owner.layers[self.key].read(hidden, *state)
        return (hidden + read.to(hidden.dtype), *rest), kwargs


class _Write(_Hook):
    """Writes what the layer gave out at the write tokens, in the rows that had a segment."""

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict, output) -> None:
        run = kwargs.get("memory_pass")
        name, state = self.state(run)
        if name is None or not run.writes:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        written = self.owner.layers[self.key].write(hidden[:, run.write_at[name]], *state)
        after = run.after.setdefault(name, dict(run.before[name]))
        for field, old, new in zip(self.fields, state, written):
            active = run.active.view(-1, *[1] * (old.dim() - 1))
            after[field] = torch.where(active, new, old)
