"""Memory tokens as an `nn.Module` that stands alone: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import nn

from ..config import layer_index
from ..core.memory import StatefulMemory, append_rows, check_range
from ..core.model import embedding_std, embedding_width, text_config
from ..core.schedule import Schedule
from ..core.state import Fields
from .config import MemoryTokensConfig
from .prefix import PrefixWriter


class MemoryTokens(StatefulMemory):
    """What is read before a segment, what writes after it, and how written states become memory.

    State, per row: `memory` (batch, slots, hidden_size) float32, right-aligned, and `length` (batch,) int64, the slots
    that were written and are read. Recurrent memory always has `n_tokens` slots, of which none is read before the first
    segment was written; accumulated memory grows by `n_tokens` with every segment, and rows that wrote less have unused
    slots on the left. In prefix mode also `output` and `cell` (batch, writer_dim) float32, of the recurrent network.

    Args:
        config: fields, see `MemoryTokensConfig`.
        hidden_size: width of the model.
        embedding_std: standard deviation of the model's input embeddings; sets the size at which memory
            enters the model.
    """

    def __init__(self, config: MemoryTokensConfig, hidden_size: int, embedding_std: float = 0.02):
        super().__init__(config)
        self.hidden_size = hidden_size
        self.schedule = Schedule.segments(config.segment_length)
        self.write_layer = config.write_layer
        self.replaces, self.by_prefix = config.mode != "accumulate", config.mode == "prefix"
        self.n_extra_tokens = config.n_tokens * (1 if self.by_prefix else 2)
        shape = (config.n_tokens, hidden_size)
        if self.by_prefix:
            width = config.writer_dim or hidden_size
            self.writer = PrefixWriter(hidden_size, config.n_tokens, width, embedding_std)
        elif self.replaces and config.write_input == "memory":
            self.initial_memory = nn.Parameter(torch.randn(shape) * embedding_std)
        else:
            self.write_tokens = nn.Parameter(torch.randn(shape) * embedding_std)
        if config.projection != "none":
            self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        if config.projection == "linear":
            self.proj = nn.Parameter(torch.eye(hidden_size))

    @classmethod
    def for_model(cls, config: MemoryTokensConfig, model: nn.Module) -> MemoryTokens:
        memory = cls(config, embedding_width(model), embedding_std(model))
        n_layers = text_config(model).num_hidden_layers
        memory.write_layer = layer_index(config.write_layer, n_layers, "write_layer")
        return memory

    def new_state(self, batch_size: int) -> Fields:
        """Memory before anything was read, none of which is read: what the first segment writes with (the learned initial
        memory), zeros where it writes with something else, or no slots when accumulating."""
        if hasattr(self, "initial_memory"):
            memory = self.initial_memory.float().expand(batch_size, -1, -1)
        else:
            slots, device = self.config.n_tokens if self.replaces else 0, next(self.parameters()).device
            memory = torch.zeros(batch_size, slots, self.hidden_size, device=device)
        length = torch.zeros(batch_size, dtype=torch.int64, device=memory.device)
        fields = {"memory": memory, "length": length}
        if self.by_prefix:
            fields["output"], fields["cell"] = self.writer.new_state(batch_size)
        return fields

    def read_inputs(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens to put before a segment: (batch, slots, hidden_size) and which are in use (batch, slots)."""
        memory, length = fields["memory"], fields["length"]
        slot = torch.arange(memory.shape[1], device=memory.device)
        return memory, slot >= memory.shape[1] - length[:, None]

    def write_inputs(self, fields: Fields) -> torch.Tensor | None:
        """Tokens to put after a segment; `update` takes what comes of them: (batch, n_tokens, hidden_size). None in
        prefix mode, where it takes what comes of the segment's last token."""
        if self.by_prefix:
            return None
        if hasattr(self, "write_tokens"):
            return self.write_tokens.expand(fields["memory"].shape[0], -1, -1)
        return fields["memory"]

    def update(
        self, fields: Fields, written: torch.Tensor, segment: torch.Tensor | None, mask: torch.Tensor
    ) -> Fields:
        """Memory after a segment; rows without a token in it keep theirs.

        Args:
            fields: memory before it.
            written: what `write_layer` gave out at the write tokens, (batch, n_tokens, hidden_size); or, without such,
                at the last token of the segment, (batch, 1, hidden_size).
            mask: (batch, tokens) bool, False at padding of the segment.
        """
        after, hidden, active = dict(fields), written.float(), mask.any(1)
        with torch.autocast(hidden.device.type, enabled=False):
            if self.by_prefix:
                hidden, output, cell = self.writer(hidden[:, 0], fields["output"], fields["cell"])
                after["output"] = torch.where(active[:, None], output, fields["output"])
                after["cell"] = torch.where(active[:, None], cell, fields["cell"])
            written = self._project(hidden)
        memory, length = fields["memory"], fields["length"]
        if self.replaces:
            after["memory"] = torch.where(active[:, None, None], written, memory)
            return {**after, "length": torch.where(active, written.shape[1], length)}
        return {
            "memory": append_rows(memory, written, active),
            "length": length + active * written.shape[1],
        }

    def _project(self, written: torch.Tensor) -> torch.Tensor:
        if self.config.projection != "none":
            written = nn.functional.rms_norm(written, (self.hidden_size,), self.norm.weight.float(), 1e-6)
        if self.config.projection == "linear":
            written = written @ self.proj.float().T
        return written

    @property
    def state_kind(self) -> str:
        return f"{self.config.type} in mode {self.config.mode}"

    grows = frozenset({"memory"})

    def check_state(self, fields: Fields, name: str) -> None:
        super().check_state(fields, name)
        slots, n_tokens = fields["memory"].shape[1], self.config.n_tokens
        if slots != n_tokens if self.replaces else slots % n_tokens:
            raise ValueError(
                f"memory {name!r}: the state holds {slots} slots, which {n_tokens} tokens in mode "
                f"{self.config.mode!r} cannot have written; it was written by another memory"
            )

    def check_numbers(self, fields: Fields, name: str) -> None:
        check_range(name, "length", fields["length"], fields["memory"].shape[1])
