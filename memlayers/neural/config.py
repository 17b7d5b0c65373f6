"""The fields of a neural memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config import ConfigError, MemoryConfig
from ..limits import Bias, Layer, Part, Rate, Tokens, Width
from .rules import RULES, Rule


class NeuralMemoryConfig(MemoryConfig):
    """A memory whose weights are learned from the text while it is read (Titans, 2501.00663; TTT, 2407.04620).

    Each head keeps a small network M. A token makes a key, a value and a query; M is taught to answer the key
    with the value, by the inner `rule`, and is then asked the query.

    Attributes:
        layers: decoder layers that have a memory; negative counts from the end. None: up to three, evenly
            spaced and centred.
        placement: `mag` adds what is read to what attention gives out, `mal` adds it to what attention takes
            in, `mac` reads in segments, and attention sees what is read as a prefix of its segment.
        rule: how a token changes the memory, see `memlayers.neural.RULES`: `titans`, `ttt`, `delta`, `atlas`
            or `decay`.
        depth: layers of M: 1 is a matrix, 2 is gelu(x W₁) W₂.
        expansion: at depth 2 the hidden layer has `expansion` · `head_dim` units.
        heads: memories side by side.
        head_dim: width of a head's key, value and query; None: the model's width divided by `heads`.
        chunk_size: gradients of so many tokens are taken at one memory, the one before the first of them
            (rules `titans`, `ttt`, `atlas`; it says nothing for the others).
        conv_kernel: width of the causal convolution on queries, keys and values; 1: none.
        momentum: False takes the momentum from a rule that has it.
        decay: False takes the forgetting from a rule that has it.
        window: tokens whose gradients are taken together (`atlas`); None: 16 for `atlas`, else 1.
        theta_max: greatest step θ, with momentum θ / (1 − η). None: the greatest that is stable whatever the text
            says, see `greatest_step`. Larger ones learn a little faster and run away where a text repeats itself.
        theta_bias: where θ / `theta_max` starts, before the sigmoid; None: see `start_biases`.
        eta_bias: where the momentum η starts, before the sigmoid.
        alpha_bias: where the forgetting α starts, before the sigmoid; None: see `start_biases`.
        initial_memory: the memory before the first token is `learned`, or says `zero` (at depth 2 only W₂ is
            zero then and W₁ is learned, for with both at zero no gradient would reach either).
        mimetic: start as linear attention, which helps recall (2410.11135): queries and keys start with equal
            maps and convolutions, forgetting near 0.
        n_persistent_tokens: learned tokens that say what every text shares: written before the text; with
            placement `mac` keys and values of the attention.
        gate: what is read is multiplied with silu(x W) before the output projection.
        segment_length: text tokens per segment, only for `mac`.
        sliding_window: tokens that attention sees back, itself included, only for `mag` and `mal`. None: as
            in the model.
        bptt_segments: back-propagate through at most this many segments; None for all of a call. `mac` only.
        write_while_decoding: also write the segments that `generate` produces. `mac` only; `mag` and `mal`
            write every token.
    """

    type: Literal["neural"] = "neural"
    layers: list[Layer] | None = Field(None, min_length=1)
    placement: Literal["mac", "mag", "mal"] = "mag"
    rule: Literal["titans", "ttt", "delta", "atlas", "decay"] = "titans"
    depth: Part = 1
    expansion: Part = 4
    heads: Part = 4
    head_dim: Width | None = None
    chunk_size: Part = 64
    conv_kernel: Part = 4
    momentum: bool = True
    decay: bool = True
    window: Width | None = None
    theta_max: Rate | None = None
    theta_bias: Bias | None = None
    eta_bias: Bias = 2.2
    alpha_bias: Bias | None = None
    initial_memory: Literal["learned", "zero"] = "learned"
    mimetic: bool = False
    n_persistent_tokens: int = Field(0, ge=0, le=512)
    gate: bool = True
    segment_length: Tokens | None = None
    sliding_window: Tokens | None = None
    bptt_segments: Tokens | None = None
    write_while_decoding: bool = False

    @model_validator(mode="after")
    def _fits_together(self):
        rule = RULES[self.rule]
        if self.depth > rule.max_depth:
            raise ConfigError(
                f"depth: {self.depth} is more than rule {self.rule!r} supports, {rule.max_depth}"
                + ("; titans, ttt and atlas take 2" if self.depth == 2 else "")
            )
        if self.window is not None and self.window > 1 and not rule.windowed:
            raise ConfigError(
                f"window: rule {self.rule!r} takes the gradient of one token, {self.window} need rule 'atlas'"
            )
        if self.placement == "mac":
            self._fits_mac()
        else:
            self._fits_attention()
        return self

    def _fits_mac(self) -> None:
        if self.segment_length is None:
            raise ConfigError("segment_length: placement 'mac' reads in segments, say how long they are")
        if self.sliding_window is not None:
            raise ConfigError(
                "sliding_window: only for placements 'mag' and 'mal'; with 'mac' attention sees its segment"
            )

    def _fits_attention(self) -> None:
        for field in ("segment_length", "bptt_segments", "write_while_decoding"):
            if getattr(self, field):
                raise ConfigError(
                    f"{field}: only for placement 'mac'; {self.placement!r} reads token by token"
                )

    @property
    def inner_rule(self) -> Rule:
        """The rule that `rule` names."""
        return RULES[self.rule]

    @property
    def has_momentum(self) -> bool:
        """The rule has momentum and `momentum` leaves it."""
        return self.momentum and self.inner_rule.momentum

    @property
    def has_decay(self) -> bool:
        """The rule forgets and `decay` leaves it."""
        return self.decay and self.inner_rule.decay

    @property
    def inner_window(self) -> int:
        """Tokens whose gradients are taken together."""
        return self.window or (16 if self.inner_rule.windowed else 1)

    @property
    def greatest_step(self) -> float:
        """`theta_max`, or the greatest θ with which no text makes the memory run away while the gates are steady.

        With keys of length 1 a step θ takes 2 θ of the error away, and one token can at most take all of it: ½ for
        `delta`. The tokens of a chunk see the same memory, so with equal keys they take 2 θ chunk_size window, which
        must stay below 2. Two layers have a greater curvature: a quarter of that (found by trying). `decay` has no
        error that could grow: 1.
        """
        if self.theta_max is not None:
            return self.theta_max
        if self.inner_rule.gradient == "chunk":
            return 1 / (self.chunk_size * self.inner_window * (1 if self.depth == 1 else 4))
        return 0.5 if self.inner_rule.gradient == "token" else 1.0

    @property
    def start_biases(self) -> dict[str, float]:
        """Where the gates start, before the sigmoid.

        θ at half of its greatest value (`delta`: an eighth, or it starts by erasing what it has just written), η at
        0.9, α at 0.001, so that a thousand tokens are remembered, around 0.007 where it is one number a head, and
        nearer to 0 with `mimetic` and at depth 2, where a memory that is forgotten has no gradient left to learn by.
        """
        theta = -2.0 if self.inner_rule.gradient == "token" else 0.0
        alpha = -5.0 if self.inner_rule.constant_decay else -7.0
        alpha = min(alpha, -10.0 if self.mimetic else 0.0, -9.0 if self.depth == 2 else 0.0)
        return {
            "theta": theta if self.theta_bias is None else self.theta_bias,
            "eta": self.eta_bias,
            "alpha": alpha if self.alpha_bias is None else self.alpha_bias,
        }

    def width_of_head(self, hidden_size: int) -> int:
        """Width of a head in a model of width `hidden_size`.

        Raises:
            ConfigError: no `head_dim` is given and `heads` do not divide the width.
        """
        if self.head_dim is None and hidden_size % self.heads:
            raise ConfigError(
                f"heads: {self.heads} do not divide the width {hidden_size}; take other heads or give head_dim"
            )
        return self.head_dim or hidden_size // self.heads
