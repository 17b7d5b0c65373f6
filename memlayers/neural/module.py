"""Neural memory as an `nn.Module` that stands alone: tokens and a state in, tokens and a new state out."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from memlayers.kernels.chunk_memory import chunk_memory

from ..core.linear import Linear
from ..core.state import Fields
from .config import NeuralMemoryConfig
from .packing import Packing, plan
from .state import as_chunk_state, as_fields, check_fields, empty_state, layer_shapes
from .streams import streams, unit

EPS = 1e-6


class NeuralMemory(nn.Module):
    """A memory in each head whose weights M learn from the tokens as they pass (Titans, 2501.00663, section 3).

    With x a token, c the causal convolution and n the ℓ2-norm of a head:

        q = n(silu(c(x W_q))),   k = n(silu(c(x W_k))),   v = silu(c(x W_v))
        θ = theta_max σ(x w_θ + b_θ) (1 − η),   η = σ(x w_η + b_η),   α = σ(x w_α + b_α),   one number a head
        M ← step of the rule on (k, v),   output = (RMSNorm(M(q)) ⊙ silu(x W_g)) W_o

    The factor 1 − η makes momentum spread a step over the tokens that follow instead of making it 1 / (1 − η) times
    as large. Every real token is written once and read after it was written. Rows do not see each other.

    Args:
        config: fields, see `NeuralMemoryConfig`; `layers` and what belongs to one placement says nothing here,
            but that with `mac` persistent tokens stand in attention and not in the memory.
        hidden_size: width of the input and the output.

    Attributes:
        initial: (heads, d_in, d_out) parameters, the memory before the first token; a layer without one is zero.
        persistent: (n_persistent_tokens, hidden_size) parameter, None without.
        kernels: which path computes, see `memlayers.kernels.paths`; None: the best for the device.

    Raises:
        ConfigError: `heads` do not divide `hidden_size` and no `head_dim` is given.
        ValueError: of its methods, for no tokens, NaN in a row (names it), a mask or a state of another shape.
    """

    def __init__(self, config: NeuralMemoryConfig, hidden_size: int):
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.head_dim = config.width_of_head(hidden_size)
        inner, heads = config.heads * self.head_dim, config.heads
        self.qkv_proj = Linear(hidden_size, 3 * inner, bias=False)
        taps = config.conv_kernel if config.conv_kernel > 1 else 0
        self.conv = nn.Parameter(torch.empty(taps, 3 * inner)) if taps else None
        constant = config.has_decay and config.inner_rule.constant_decay
        self.alpha = nn.Parameter(torch.empty(heads)) if constant else None
        self.gate_names = (
            ["theta"] + ["eta"] * config.has_momentum + ["alpha"] * (config.has_decay and not constant)
        )
        self.gates = Linear(hidden_size, len(self.gate_names) * heads)
        shapes = layer_shapes(config, self.head_dim)
        learned = shapes if config.initial_memory == "learned" else shapes[:-1]
        self.initial = nn.ParameterList(torch.empty(heads, *shape) for shape in learned)
        n_persistent = 0 if config.placement == "mac" else config.n_persistent_tokens
        self.persistent = nn.Parameter(torch.empty(n_persistent, hidden_size)) if n_persistent else None
        self.norm_scale = nn.Parameter(torch.empty(heads, self.head_dim))
        self.out_gate = Linear(hidden_size, inner, bias=False) if config.gate else None
        self.out_proj = Linear(inner, hidden_size, bias=False)
        self.kernels: str | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of everything."""
        config, inner = self.config, self.config.heads * self.head_dim
        for projection in filter(None, (self.qkv_proj, self.out_gate, self.out_proj)):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        nn.init.normal_(self.gates.weight, std=0.1 * self.hidden_size**-0.5)
        for name, bias in zip(self.gate_names, self.gates.bias.view(-1, config.heads)):
            nn.init.constant_(bias, config.start_biases[name])
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(config.conv_kernel**-0.5), config.conv_kernel**-0.5)
        if self.alpha is not None:  # heads that forget at different speeds
            spread = torch.linspace(-2, 2, config.heads) if config.heads > 1 else 0.0
            self.alpha.copy_(config.start_biases["alpha"] + spread)
        for weight in self.initial:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if self.persistent is not None:
            nn.init.normal_(self.persistent)
        nn.init.ones_(self.norm_scale)
        if config.mimetic:  # 2410.11135, section 4: read like linear attention
            self.qkv_proj.weight[inner : 2 * inner] = self.qkv_proj.weight[:inner]
            if self.conv is not None:
                self.conv[:, inner : 2 * inner] = self.conv[:, :inner]

    @property
    def state_dtype(self) -> torch.dtype:
        """float32, or float64 for a module in float64."""
        return torch.promote_types(self.out_proj.weight.dtype, torch.float32)

    def new_state(self, batch_size: int) -> Fields:
        """The memory before the first token of `batch_size` rows, see `memlayers.neural.state.state_shapes`.

        It has read the persistent tokens; gradients go through it to them and to the initial memory.
        """
        like = torch.empty(0, dtype=self.state_dtype, device=self.out_proj.weight.device)
        fields = empty_state(self.config, self.head_dim, like)
        for i, weight in enumerate(self.initial):
            for part in ("weights", "anchor"):
                if f"{part}.{i}" in fields:
                    fields[f"{part}.{i}"] = weight[None].to(self.state_dtype)
        if self.persistent is not None:
            _, fields = self._pass(self.persistent[None], fields, None, [0])
        return {name: field.expand(batch_size, *field.shape[1:]).clone() for name, field in fields.items()}

    def check_state(self, fields: Fields, name: str = "neural") -> None:
        """Raise ValueError, naming memory `name` and the field, when `fields` is no state of this memory."""
        check_fields(fields, self.config, self.head_dim, name)

    def forward(
        self, x: torch.Tensor, state: Fields | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Fields]:
        """Write every token and read for each what the memory then holds.

        Args:
            x: (B, T, hidden_size).
            state: from an earlier call, or `new_state` (the default). It is not changed.
            mask: (B, T) bool, False at pads, which may stand anywhere: they change nothing and read 0.

        Returns:
            (B, T, hidden_size) in the dtype of x, and the state after the last token.
        """
        self._check_input(x, mask)
        if state is None:
            state = self.new_state(len(x))
        else:
            self.check_state(state)
            _check_batch(state, x)
        places = state["position"].tolist()
        counts = [x.shape[1]] * len(x) if mask is None else mask.sum(1).tolist()
        if not any(counts):
            return torch.zeros_like(x), dict(state)
        inner = x.to(self.out_proj.weight.dtype)
        if min(counts) == x.shape[1] and len(set(places)) == 1:
            y, state = self._pass(inner, state, None, places)
            return y.to(x.dtype), state
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        packing = plan(mask, places, counts, self.config.chunk_size)
        y, state = self._pass(packing.pack(inner), state, packing, places)
        return packing.unpack(y).to(x.dtype), state

    def read(self, x: torch.Tensor, state: Fields) -> torch.Tensor:
        """Ask the memory without writing; queries have no convolution, for nothing says what stood before them.

        Args:
            x: (B, T, hidden_size).
            state: what is asked.

        Returns:
            (B, T, hidden_size) in the dtype of x.
        """
        self._check_input(x, None)
        self.check_state(state)
        _check_batch(state, x)
        inner, width = x.to(self.out_proj.weight.dtype), self.config.heads * self.head_dim
        query = F.linear(inner, self.qkv_proj.weight[:width]).unflatten(-1, (-1, self.head_dim))
        query = unit(F.silu(query)).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            first, *second = as_chunk_state(state, self.state_dtype).weights
            y = query.to(self.state_dtype) @ first
            for weight in second:
                y = F.gelu(y) @ weight
        return self._output(y, inner).to(x.dtype)

    def _pass(
        self, x: torch.Tensor, state: Fields, packing: Packing | None, places: list[int]
    ) -> tuple[torch.Tensor, Fields]:
        """Tokens that stand as `packing` says; without it all are real and all rows are at one place."""
        config = self.config
        q, k, v, tail = self._streams(x, state, packing)
        theta, eta, alpha = self._gates(x)
        y, new = chunk_memory(
            q,
            k,
            v,
            theta,
            eta,
            alpha,
            as_chunk_state(state, self.state_dtype),
            chunk_size=config.chunk_size,
            first=config.chunk_size - places[0] if packing is None else packing.first,
            active=None if packing is None else packing.active,
            gradient=config.inner_rule.gradient,
            window=config.inner_window,
            path=self.kernels,
        )
        written = x.shape[1] if packing is None else packing.end - packing.start
        position = (state["position"] + written) % config.chunk_size
        if packing is not None and new.anchor:  # rows that start in column 0 wherever they are in their chunk
            full = (position == 0)[:, None, None, None]
            new = new._replace(
                anchor=tuple(torch.where(full, *pair) for pair in zip(new.weights, new.anchor))
            )
        fields = {**as_fields(new), **tail, "position": position, "rule": state["rule"].clone()}
        return self._output(y, x), fields

    def _streams(self, x: torch.Tensor, state: Fields, packing: Packing | None):
        """q, k and v, each (B, heads, T, head_dim), and the convolution's part of the new state."""
        projected = self.qkv_proj(x)
        q, k, v, tail = streams(projected, self.config.heads, self.conv, state.get("conv"), packing)
        return q, k, v, {} if tail is None else {"conv": tail.to(self.state_dtype)}

    def _gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """θ, η and α, each (B, heads, T), float32 or better; None where the rule has none."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = (p.to(self.state_dtype) for p in self.gates.parameters())
            logits = F.linear(x.to(self.state_dtype), weight, bias).unflatten(-1, (-1, self.config.heads))
            gates = dict(zip(self.gate_names, torch.sigmoid(logits).permute(2, 0, 3, 1)))
            if self.alpha is not None:
                alpha = torch.sigmoid(self.alpha.to(self.state_dtype))
                gates["alpha"] = alpha[:, None].expand(gates["theta"].shape)
            theta, eta = self.config.greatest_step * gates["theta"], gates.get("eta")
            theta = theta if eta is None else theta * (1 - eta)
            return theta, eta, gates.get("alpha")

    def _output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y (B, heads, T, head_dim) → (B, T, hidden_size)."""
        y = F.rms_norm(y.transpose(1, 2).to(self.state_dtype), (self.head_dim,), eps=EPS) * self.norm_scale
        y = y.flatten(-2).to(x.dtype)
        if self.out_gate is not None:
            y = y * F.silu(self.out_gate(x))
        return self.out_proj(y)

    def _check_input(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, this memory takes (batch, T, {self.hidden_size})"
            )
        if not x.shape[1]:
            raise ValueError("x has no tokens (T = 0); leave the call out")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"mask is a {mask.dtype} tensor of shape {tuple(mask.shape)}, expected bool of {tuple(x.shape[:2])}"
            )
        if torch.isfinite(x.detach().sum()):  # one pass; the exact look only where it fails
            return
        bad = ~torch.isfinite(x.detach()).all(-1)
        bad = bad if mask is None else bad & mask
        if bad.any():
            rows = ", ".join(
                f"row {row} holds NaN or infinity (first at token {int(bad[row].nonzero()[0])})"
                for row in bad.any(1).nonzero().flatten().tolist()
            )
            raise ValueError(f"{rows}; nothing was written, leave the row out or mask these tokens")

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"rule={c.rule!r}, depth={c.depth}, {c.heads} heads of {self.head_dim}, chunks of {c.chunk_size}"
        )


def _check_batch(state: Fields, x: torch.Tensor) -> None:
    if len(state["position"]) != len(x):
        raise ValueError(f"the state has {len(state['position'])} rows, x has {len(x)}")
