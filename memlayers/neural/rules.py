"""The inner rules: how a memory is changed by a token. One line each; the arithmetic is `kernels/chunk_memory`.

With ℓ(M; k, v) = ‖M(k) − v‖² and the gates θ (step), η (momentum) and α (forgetting), all rules are

    S_t = η_t S_{t-1} − θ_t ∇ℓ,    M_t = (1 − α_t) M_{t-1} + S_t        (Titans, 2501.00663, equations 13 and 14)

and differ in which of the gates they have and where the gradient is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """What `chunk_memory` is asked to do.

    Attributes:
        momentum: S is carried on with η; without it S_t = −θ_t ∇ℓ.
        decay: M is forgotten with α.
        gradient: where ∇ℓ is taken: at the memory before the `chunk`, at the decayed memory before the
            `token`, or nowhere (`none`: M_t = (1 − α) M_{t-1} + θ_t kᵀv).
        windowed: ∇ℓ may be summed over the last `window` tokens.
        max_depth: layers that the memory may have.
        constant_decay: α is one learned number a head, not a function of the token.
        code: what a state carries so that it is not read by another rule; never given to another one.
    """

    momentum: bool
    decay: bool
    gradient: Literal["chunk", "token", "none"]
    windowed: bool
    max_depth: int
    constant_decay: bool = False
    code: int = 0


RULES: dict[str, Rule] = {
    # Titans, 2501.00663, section 3.1: momentum and forgetting, gradients in a chunk side by side.
    "titans": Rule(momentum=True, decay=True, gradient="chunk", windowed=False, max_depth=2, code=1),
    # TTT-Linear and TTT-MLP, 2407.04620, section 2.4: gradient descent in mini-batches.
    "ttt": Rule(momentum=False, decay=False, gradient="chunk", windowed=False, max_depth=2, code=2),
    # Gated delta rule, 2412.06464, equation 10: each token's gradient at the memory it finds.
    "delta": Rule(momentum=False, decay=True, gradient="token", windowed=False, max_depth=1, code=3),
    # ATLAS' Omega rule with momentum, 2505.23735, section 3.2: the last tokens together, not the last one.
    "atlas": Rule(momentum=True, decay=True, gradient="chunk", windowed=True, max_depth=2, code=4),
    # Fast and Forgetful Memory, 2310.04128, section 4: a sum that fades, no inner gradient.
    "decay": Rule(False, True, gradient="none", windowed=False, max_depth=1, constant_decay=True, code=5),
}
