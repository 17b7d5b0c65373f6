"""Attention that has a second derivative, for writing that is differentiated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class TwiceDifferentiable(TorchFunctionMode):
    """In place of fused attention, whose gradient has none of its own, the plain one that torch falls back to. In this
    thread alone: `torch.nn.attention.sdpa_kernel` sets what all threads of a process read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = _plain if func is F.scaled_dot_product_attention else func
        return func(*args, **(kwargs or {}))


def _plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does with the fused one
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype)
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    with torch.autocast(device, enabled=False):
        return torch._scaled_dot_product_attention_math(*given, scale=scale, enable_gqa=enable_gqa)[0]
