"""A gradient norm that knows sparse gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .row_sparse_adamw import coalesce_rows


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> torch.Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most `largest`; None only measures.

    `torch.nn.utils.clip_grad_norm_` raises on sparse gradients. Here these are coalesced first, so that a row
    that was read twice counts once, with the sum of its gradients, as in a dense gradient.

    Returns:
        The norm before scaling, a float32 scalar on the gradients' device.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = coalesce_rows(parameter.grad)
            values.append(parameter.grad._values())
        else:
            values.append(parameter.grad)
    if not values:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(values)
    if largest is not None:
        torch._foreach_mul_(values, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
