"""`ReversibleMemory`: where the compressor sits in a model, its state, and reading it back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..core.checks import check_part
from ..core.masks import padding_first, padding_last
from ..core.memory import StatefulMemory, append_rows, check_range
from ..core.model import embedding_std, embedding_width, memories
from ..core.schedule import Plan, Schedule, take
from ..core.state import Fields, MemoryState
from .config import ReversibleMemoryConfig
from .module import ReversibleCompressor, token_scores


class ReversibleMemory(StatefulMemory):
    """Memory tokens of all segments so far, read before the next one; text can be read back of them.

    State, per row: `compressed` (batch, slots, hidden_size) float32, as the compressor leaves it, right-aligned, n_tokens
    slots a segment; `tokens` (batch, segments) int64, the text tokens of each, 0 on the left of rows that wrote less;
    and `length` (batch,) int64, the slots in use.

    Attributes:
        compressor: the `ReversibleCompressor`, over embeddings of the base at unit size.
        log_std: logarithm of the size of the base's embeddings.
        norm, proj: from memory to what the base reads; they begin as embeddings' size and 1.
    """

    def __init__(self, config: ReversibleMemoryConfig, hidden_size: int, embedding_std: float = 0.02):
        super().__init__(config)
        self.hidden_size = hidden_size
        self.segment_length, self.n_extra_tokens = config.segment_length, config.n_tokens
        self.schedule = Schedule.segments(config.segment_length)
        self.compressor = ReversibleCompressor(config, hidden_size)
        self.log_std = nn.Parameter(torch.tensor(math.log(embedding_std)))
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        nn.init.constant_(self.norm.weight, embedding_std)
        self.proj = nn.Parameter(torch.eye(hidden_size))

    @classmethod
    def for_model(cls, config: ReversibleMemoryConfig, model: nn.Module) -> ReversibleMemory:
        return cls(config, embedding_width(model), embedding_std(model))

    grows = frozenset({"compressed", "tokens"})

    def new_state(self, batch_size: int) -> Fields:
        """No slots."""
        whole = {"dtype": torch.int64, "device": self.proj.device}
        return {
            "compressed": torch.zeros(batch_size, 0, self.hidden_size, device=self.proj.device),
            "tokens": torch.zeros(batch_size, 0, **whole),
            "length": torch.zeros(batch_size, **whole),
        }

    def read_inputs(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens to put before a segment: (batch, slots, hidden_size) and which are in use (batch, slots)."""
        memory = fields["compressed"]
        with torch.autocast(memory.device.type, enabled=False):
            shown = F.rms_norm(memory, (self.hidden_size,), self.norm.weight.float(), 1e-6)
            shown = shown @ self.proj.float().T
        slot = torch.arange(memory.shape[1], device=memory.device)
        return shown, slot >= memory.shape[1] - fields["length"][:, None]

    def update(self, fields: Fields, written: None, segment: torch.Tensor, mask: torch.Tensor) -> Fields:
        """Memory after a segment of embeddings (batch, tokens, hidden_size); mask (batch, tokens) bool, False at
        padding. Rows without a token keep their memory."""
        n_tokens, active = mask.sum(1), mask.any(1)
        memory = self.compress(*_on_the_left(segment, mask, self.segment_length))
        return {
            "compressed": append_rows(fields["compressed"], memory, active),
            "tokens": append_rows(fields["tokens"], n_tokens[:, None], active),
            "length": fields["length"] + active * memory.shape[1],
        }

    def compress(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Memory (rows, n_tokens, hidden_size) float32 of embeddings (rows, segment_length, hidden_size)."""
        with torch.autocast(embeds.device.type, enabled=False):
            return self.compressor.compress(self._unit(embeds), mask)

    def scores(self, memory: torch.Tensor, mask: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """Logits (rows, segment_length, vocabulary) of the text of memory (rows, n_tokens, hidden_size), by nearness to
        the embeddings of the base `model`; mask: which places hold a token."""
        with torch.autocast(memory.device.type, enabled=False):
            return token_scores(self.compressor.restore(memory, mask), self._table(model))

    def _table(self, model: nn.Module) -> torch.Tensor:
        embeddings = model.get_input_embeddings()
        every = torch.arange(embeddings.num_embeddings, device=embeddings.weight.device)
        return self._unit(embeddings(every))

    def _unit(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds.float() / self.log_std.float().exp()

    def extra_loss(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (nats) of the tokens of text (batch, tokens) when each segment is compressed and read back,
        the mean over reading back from every level; mask (batch, tokens) bool, False at padding. The memory that a call of
        `model` leaves is that of the last level."""
        ids, used = _segments(input_ids, mask, self.segment_length)
        x, table = self._unit(model.get_input_embeddings()(ids)), self._table(model)
        losses = []
        with torch.autocast(x.device.type, enabled=False):
            for level, memory in enumerate(self.compressor.compress_by_level(x, used)):
                scores = token_scores(self.compressor.restore(memory, used, level)[used], table)
                losses.append(F.cross_entropy(scores, ids[used]))
        return torch.stack(losses).mean()

    def check_extra_loss(self, weight: float) -> str | None:
        if weight == 0 and self.config.backwards == "separate":
            return (
                "is 0, and nothing else teaches the decoder of memory {name!r} (backwards: separate); give it a weight, or "
                "set backwards: inverse"
            )
        return None

    @torch.no_grad()
    def read_back(self, model: nn.Module, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (batch, tokens) int64 of what is remembered, padded on the left with 0, and their mask, bool."""
        batch, n_segments = fields["tokens"].shape
        tokens = fields["tokens"].flatten()
        mask = torch.arange(self.segment_length, device=tokens.device) < tokens[:, None]
        memory = fields["compressed"].reshape(-1, self.config.n_tokens, self.hidden_size)
        ids = torch.zeros_like(mask, dtype=torch.int64)
        for start in range(0, len(memory), 64):
            rows = slice(start, start + 64)
            ids[rows] = self.scores(memory[rows], mask[rows], model).argmax(-1)
        ids, mask = (x.reshape(batch, n_segments * self.segment_length) for x in (ids * mask, mask))
        order = padding_first(mask)
        longest = int(mask.sum(1).max()) if mask.numel() else 0
        start = mask.shape[1] - longest
        return ids.gather(1, order)[:, start:], mask.gather(1, order)[:, start:]

    def check_state(self, fields: Fields, name: str) -> None:
        super().check_state(fields, name)
        slots, n_segments = fields["compressed"].shape[1], fields["tokens"].shape[1]
        if slots != self.config.n_tokens * n_segments:
            raise ValueError(
                f"memory {name!r}: field 'compressed' of the state has {slots} slots for {n_segments} segments, this memory "
                f"has {self.config.n_tokens} a segment; the state was written by another memory"
            )

    def check_numbers(self, fields: Fields, name: str) -> None:
        check_range(name, "tokens", fields["tokens"], self.segment_length)
        check_range(name, "length", fields["length"], fields["compressed"].shape[1])


def read_back(
    model: nn.Module, state: MemoryState, name: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text that a memory of `model` gives back: ids (batch, tokens), padded on the left with 0, and their mask.

    Tokens of the open segment are not written yet; `ml.write(..., close=True)`, the default, writes them.

    Args:
        name: of the memory; None: the only one that can be read back.

    Raises:
        ValueError: no such memory, several and no name, or a state of another memory.
    """
    found = {
        n: m for n, m in memories(model).items() if isinstance(m, ReversibleMemory) and name in (None, n)
    }
    if len(found) != 1:
        raise ValueError(
            f"read_back needs one memory that can be read back, found {sorted(found) or 'none'} among "
            f"{sorted(memories(model)) or 'none'}" + (f" under the name {name!r}" if name else "; give name=")
        )
    name, memory = next(iter(found.items()))
    if name not in state.fields:
        raise ValueError(f"the state has no memory {name!r}; it has {sorted(state.fields)}")
    check_part(memory, state, name)
    return memory.read_back(model, state[name])


def _on_the_left(x: torch.Tensor, mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The real tokens of (rows, tokens, ...) on the left of `width` places, and their mask."""
    order = padding_last(mask)
    missing = width - mask.shape[1]
    x = take(x, order).masked_fill(~mask.gather(1, order)[..., None], 0)
    return F.pad(x, (0, 0, 0, missing)), F.pad(mask.gather(1, order), (0, missing))


def _segments(input_ids: torch.Tensor, mask: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments that a text is read in, (segments, size) ids and mask, with their tokens on the left; none empty."""
    plan = Plan.of(mask, size)
    ids, used = plan.arrange(input_ids[..., None], mask)
    missing = plan.n_segments * size - plan.width
    ids, used = F.pad(ids, (0, 0, 0, missing)), F.pad(used, (0, missing))
    ids, used = _on_the_left(ids.reshape(-1, size, 1), used.reshape(-1, size), size)
    kept = used.any(1)
    return ids[kept, :, 0], used[kept]
