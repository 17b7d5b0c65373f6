"""One linear memory that is written already: what is read from it in all chunks at once, and the gradients (`linear.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_decay import Decays
from .triton_read import mix, outer, response_gradient
from .triton_tiles import Layout


class Layer:
    """keys (N, T, d_in), w (N, T, d_out), what is written; states (N, n_chunks + 1, P, d_in, d_out), before each chunk
    and after the last.

    `read_backward` sets d_w, what the reads owe to w, and d_states, what they owe to the states before the chunks; that
    after the last is left open. `keys_backward` and `keep_backward` want all that is owed to the states.
    """

    def __init__(self, layout: Layout, decay: Decays, keys: Tensor, w: Tensor, states: Tensor):
        self.layout, self.decay, self.keys, self.w, self.states = layout, decay, keys, w, states
        self.parts = states.shape[2]

    def read(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, T, d_out) in `dtype` for queries (N, T, d_in)."""
        pairs, carry = (self.keys, self.w, self.decay.response), self.decay.carry
        return mix(self.layout, q, pairs, self.states, carry, parts=self.parts, dtype=dtype)[0]

    def read_backward(self, q: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, in its dtype, of decay.carry and of decay.response."""
        response, carry = self.decay.response, self.decay.carry
        self.q, self.d_y = q, d_y
        self.d_w, _ = mix(self.layout, self.keys, (q, d_y, response), flip_response=True)
        self.d_states = outer(self.layout, q, carry, d_y)
        d_response = response_gradient(self.layout, q, self.keys, d_y, self.w)
        d_q, d_carry = mix(
            self.layout, d_y, (self.w, self.keys, response), self.states, carry,
            parts=self.parts, flip_states=True, other=q, dtype=q.dtype,
        )  # fmt: skip
        return d_q, d_carry, d_response

    def keys_backward(self) -> tuple[Tensor, Tensor]:
        """What reads and writes owe to the keys, float32, and the gradient of decay.last."""
        return mix(
            self.layout, self.w, (self.d_y, self.q, self.decay.response), self.d_states[:, 1:], self.decay.last,
            parts=self.parts, flip_states=True, flip_response=True, other=self.keys,
        )  # fmt: skip

    def reads_to_keys(self) -> Tensor:
        """What the reads alone owe to the keys, float32."""
        pairs = self.d_y, self.q, self.decay.response
        return mix(self.layout, self.w, pairs, flip_response=True)[0]

    def last_backward(self) -> Tensor:
        """The gradient of decay.last alone."""
        d_after, last = self.d_states[:, 1:], self.decay.last
        return mix(self.layout, self.keys, None, d_after, last, parts=self.parts, other=self.w)[1]

    def keep_backward(self) -> Tensor:
        """The gradient of decay.keep: (steps, 3), of β, m and f, or (steps, 1), of β."""
        before, d_after = self.states[:, :-1], self.d_states[:, 1:]
        own = (d_after * before).sum((-1, -2)).flatten(0, 1)
        if self.parts == 1:
            return own
        pushed = (d_after[:, :, 0] * before[:, :, 1]).sum((-1, -2)).view(-1, 1)
        return torch.cat((own, pushed), 1)
