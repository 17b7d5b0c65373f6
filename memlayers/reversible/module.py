"""`ReversibleCompressor`: text in, memory tokens out, and back. An `nn.Module` that stands alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ConfigError
from ..core.linear import Linear
from .config import ReversibleMemoryConfig


class ReversibleCompressor(nn.Module):
    """Segments of text into memory tokens and back, after R³Mem (2502.15957).

    Of the paper we could read the abstract and a summary: virtual memory tokens compress a text from document to
    paragraph to entity, the model run backwards expands them again, and both directions and their cycle are trained.
    Ours differs where we know: the invertible network is a stack of its own over the base's embeddings, not adapters
    inside the base, the levels are equal spans and not found entities, and there is no supervised pair of texts.

    A level runs [learned slots ; span] through its couplings. What stands at the slots is memory; what stands at the
    span is dropped and taken for zero on the way back, so that a span returns exactly as far as its couplings have
    learned to leave zero there.

    Args:
        config: fields, see `ReversibleMemoryConfig`.
        hidden_size: width of text and memory, even.

    Raises:
        ConfigError: an odd width, or one that `heads` do not divide.
    """

    def __init__(self, config: ReversibleMemoryConfig, hidden_size: int):
        super().__init__()
        if hidden_size % 2 or hidden_size % config.heads:
            raise ConfigError(
                f"heads: {config.heads} heads and two halves must divide the width {hidden_size}"
            )
        self.config, self.hidden_size = config, hidden_size
        self.levels = nn.ModuleList(Level(config, ratio, hidden_size) for ratio in config.ratios)

    def compress(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Memory (rows, n_tokens, hidden_size) of x (rows, segment_length, hidden_size), about unit size, float32 or
        float64; mask (rows, segment_length) bool, False at padding, which stands on the right."""
        return self.compress_by_level(x, mask)[-1]

    def compress_by_level(self, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """The memory of every level, (rows, its vectors, hidden_size), from the text up; the last one is kept."""
        rows, memories = len(x), []
        for level, used in zip(self.levels, self._masks(mask)):
            spans = x.reshape(-1, level.n_inputs, self.hidden_size)
            memory, _ = level.compress(spans, used.reshape(-1, level.n_inputs))
            x = memory.reshape(rows, -1, self.hidden_size)
            memories.append(x)
        return memories

    def restore(self, memory: torch.Tensor, mask: torch.Tensor, level: int = -1) -> torch.Tensor:
        """Text (rows, segment_length, hidden_size) of the memory of a level; mask as when compressing."""
        rows, x, top = len(memory), memory, range(len(self.levels))[level] + 1
        for level, used in zip(self.levels[:top][::-1], self._masks(mask)[:top][::-1]):
            spans = x.reshape(-1, self.config.n_tokens, self.hidden_size)
            x, _ = level.restore(spans, used.reshape(-1, level.n_inputs))
            x = x.reshape(rows, -1, self.hidden_size)
        return x

    def _masks(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """Which inputs of each level hold something."""
        masks, n_tokens = [mask], self.config.n_tokens
        for level in self.levels[:-1]:
            spans = masks[-1].reshape(len(mask), -1, level.n_inputs).any(-1)
            masks.append(spans.repeat_interleave(n_tokens, dim=1))
        return masks


class Level(nn.Module):
    """Spans of n_tokens · ratio vectors into n_tokens vectors, and back."""

    def __init__(self, config: ReversibleMemoryConfig, ratio: int, width: int):
        super().__init__()
        self.n_slots, self.n_inputs = config.n_tokens, config.n_tokens * ratio
        self.inverts = config.backwards == "inverse"
        self.slots = nn.Parameter(torch.randn(config.n_tokens, width))
        self.couplings = nn.ModuleList(
            Coupling(width, config.n_tokens, self.n_inputs, config.heads, config.expansion)
            for _ in range(config.depth)
        )

    def compress(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory (rows, n_slots, width) and the rest (rows, n_inputs, width) of x (rows, n_inputs, width)."""
        used, n = self._used(mask), len(self.couplings)
        h = torch.cat([self.slots.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        for coupling in self.couplings if self.inverts else self.couplings[: n // 2]:
            h = coupling(h, used)
        return h[:, : self.n_slots], h[:, self.n_slots :]

    def restore(
        self, memory: torch.Tensor, mask: torch.Tensor, rest: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (rows, n_inputs, width) and what stands at the slots, of memory and the rest, zero by default."""
        used, n = self._used(mask), len(self.couplings)
        if rest is None:
            rest = memory.new_zeros(len(memory), self.n_inputs, memory.shape[-1])
        h = torch.cat([memory, rest], dim=1)
        if self.inverts:
            for coupling in reversed(self.couplings):
                h = coupling.inverse(h, used)
        else:
            for coupling in self.couplings[n // 2 :]:
                h = coupling(h, used)
        return h[:, self.n_slots :], h[:, : self.n_slots]

    def _used(self, mask: torch.Tensor) -> torch.Tensor | None:
        return None if mask.all() else F.pad(mask, (self.n_slots, 0), value=True)


class Coupling(nn.Module):
    """One invertible step (RevNet, 1707.04585) on two halves of the width: y1 = x1 + attention(x2), y2 = x2 + mlp(y1).
    The halves then change places, so that the next step attends to the other one.

    Attributes:
        route: (heads, places, places), added to the attention's scores.
    """

    def __init__(self, width: int, n_slots: int, n_inputs: int, heads: int, expansion: int):
        super().__init__()
        half, inner = width // 2, expansion * width // 2
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(half, eps=1e-6), nn.RMSNorm(half, eps=1e-6)
        self.places = nn.Parameter(torch.randn(n_slots + n_inputs, half) / 2)
        self.route = nn.Parameter(first_route(n_slots, n_inputs, heads))
        self.qkv, self.out = Linear(half, 3 * width, bias=False), Linear(width, half, bias=False)
        self.up, self.down = Linear(half, inner), Linear(inner, half, bias=False)
        for last in (self.out, self.down):
            nn.init.normal_(last.weight, std=0.5 / last.in_features**0.5)

    def forward(self, x: torch.Tensor, used: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, places, width) to the same; used: (rows, places) bool, places that may be attended to; None: all."""
        x1, x2 = x.chunk(2, dim=-1)
        y1 = x1 + self._attention(x2, used)
        return torch.cat([x2 + self._mlp(y1), y1], dim=-1)

    def inverse(self, y: torch.Tensor, used: torch.Tensor | None = None) -> torch.Tensor:
        """The x of which `forward` makes y."""
        y2, y1 = y.chunk(2, dim=-1)
        x2 = y2 - self._mlp(y1)
        return torch.cat([y1 - self._attention(x2, used), x2], dim=-1)

    def _attention(self, x: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
        rows, places, _ = x.shape
        x = _normed(self.norm_1, x) + self.places.to(x.dtype)
        q, k, v = _linear(self.qkv, x).view(rows, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Not torch's fused attention, which takes another path, and rounds in another way, once `route` is frozen.
        scores = q @ k.mT * q.shape[-1] ** -0.5 + self.route.to(x.dtype)
        if used is not None:
            scores = scores.masked_fill(~used[:, None, None], float("-inf"))
        read = scores.softmax(-1) @ v
        return _linear(self.out, read.transpose(1, 2).reshape(rows, places, -1))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(self.down, F.gelu(_linear(self.up, _normed(self.norm_2, x))))


def first_route(n_slots: int, n_inputs: int, heads: int, strength: float = 8.0) -> torch.Tensor:
    """Where attention begins to look, (heads, places, places): slot j and the j-th stretch of the inputs at each other,
    every head at another place of the stretch. Without it the first hundreds of steps go into finding this."""
    route, ratio = torch.zeros(heads, n_slots + n_inputs, n_slots + n_inputs), n_inputs // n_slots
    for head in range(heads):
        place = head % ratio if heads >= ratio else head * ratio // heads
        for slot in range(n_slots):
            text = n_slots + slot * ratio + place
            route[head, slot, text] = route[head, text, slot] = strength
    return route


def token_scores(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """How near x (..., width) is to each row of table (tokens, width): −|x − row|² / 2√width, less what all share."""
    return (x @ table.T - table.square().sum(-1) / 2) / table.shape[-1] ** 0.5


def _normed(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def _linear(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """In x's dtype, whatever that of the weights: bfloat16 would not come back exactly."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
