"""What the tests of chunk_memory are made of: rules, layouts of tokens in chunks, and random arguments for them."""

from typing import NamedTuple

import pytest
import torch

from memlayers.kernels.chunk_memory import ChunkState, chunk_memory


class Rule(NamedTuple):
    gradient: str
    depth: int = 1
    window: int = 1
    momentum: bool = True
    decay: bool = True


RULES = {
    "titans": Rule("chunk"),
    "titans, two layers": Rule("chunk", depth=2),
    "no momentum": Rule("chunk", momentum=False),
    "no decay": Rule("chunk", decay=False),
    "ttt": Rule("chunk", momentum=False, decay=False),
    "ttt, two layers": Rule("chunk", depth=2, momentum=False, decay=False),
    "atlas": Rule("chunk", window=3),
    "atlas, two layers": Rule("chunk", depth=2, window=2),
    "window longer than a chunk": Rule("chunk", window=8, momentum=False),
    "delta": Rule("token", momentum=False),
    "delta, no decay": Rule("token", momentum=False, decay=False),
    "decaying sum": Rule("none", momentum=False),
    "sum": Rule("none", momentum=False, decay=False),
}


class Layout(NamedTuple):
    """spans: the active columns of each row, from and to; None: all."""

    length: int
    chunk_size: int
    first: int
    spans: tuple | None = None


LAYOUTS = {
    "whole chunks": Layout(8, 4, 4),
    "rest, whole chunks, begun": Layout(11, 4, 3),
    "within a chunk": Layout(2, 8, 6),
    "to the end of a chunk": Layout(3, 8, 3),
    "chunks of one": Layout(5, 1, 1),
    "one token": Layout(1, 4, 2),
    "ragged": Layout(11, 4, 3, ((1, 11), (0, 9), (0, 0), (2, 5), (0, 7), (0, 3))),
    "ragged within a chunk": Layout(4, 8, 7, ((0, 3), (2, 4), (0, 0), (1, 3))),
    "ragged, chunks of one": Layout(4, 1, 1, ((0, 4), (0, 2), (0, 0))),
}

ROUNDING = 1e-12  # float64: sums of some dozen terms of about 1, taken in another order; the bar is 1e-10
PATHS = ["reference", "cpu"]
all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def make(rule, layout, heads=2, d=3, d_v=4, hidden=5, dtype=torch.float64, size=1.0, seed=0):
    """Random arguments for `call`: q, k, v, theta, eta, alpha, state. Streams lie in memory as a layer makes them.

    Anchors differ from weights, as in an open chunk.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = len(layout.spans) if layout.spans else 2
    precise = torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def stream(width):
        return normal(batch, layout.length, heads, width).to(dtype).transpose(1, 2)

    def gate(scale):
        gates = torch.rand(batch, heads, layout.length, generator=generator, dtype=torch.float64)
        return (scale * gates).to(precise)

    def memory():
        widths = [(d, d_v)] if rule.depth == 1 else [(d, hidden), (hidden, d_v)]
        return tuple(0.5 * normal(batch, heads, *width).to(precise) for width in widths)

    state = ChunkState(
        weights=memory(),
        momentum=memory() if rule.momentum else (),
        anchor=memory() if rule.gradient == "chunk" else (),
        halo=tuple(normal(batch, heads, rule.window - 1, width).to(precise) for width in (d, d_v))
        if rule.window > 1
        else (),
    )
    gates = gate(0.2), gate(1.0) if rule.momentum else None, gate(1.0) if rule.decay else None
    return [stream(d), stream(d), stream(d_v), *gates, state]


def call(arguments, rule, layout, path="cpu"):
    """chunk_memory: y and the new state."""
    active = None
    if layout.spans is not None:
        place = torch.arange(layout.length)
        active = torch.stack([(start <= place) & (place < stop) for start, stop in layout.spans])
    return chunk_memory(
        *arguments,
        chunk_size=layout.chunk_size,
        first=layout.first,
        active=active,
        gradient=rule.gradient,
        window=rule.window,
        path=path,
    )


def tensors(*values) -> list[torch.Tensor]:
    """All tensors in arguments, states and results, in order."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors(*value)
    return found


def replaced(values, new) -> list:
    """`values` with its tensors, in order, taken from the iterator `new`."""
    if isinstance(values, torch.Tensor):
        return next(new)
    if isinstance(values, ChunkState):
        return ChunkState(*(replaced(part, new) for part in values))
    if isinstance(values, tuple | list):
        return type(values)(replaced(value, new) for value in values)
    return values


def with_gradients(arguments, rule, layout, path="cpu"):
    """Tensors of the result, and the gradients of the arguments for fixed random gradients of the result."""
    leaves = [x.detach().requires_grad_() for x in tensors(arguments)]
    results = tensors(call(replaced(arguments, iter(leaves)), rule, layout, path))
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    found = torch.autograd.grad(results, leaves, directions, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]
    return [x.detach() for x in results], gradients


def check_close(actual, expected, tolerance) -> None:
    """Each tensor within `tolerance` of the other, relative to its largest element where that is above 1."""
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert a.shape == b.shape
        if a.numel():
            error, size = (a.double() - b.double()).abs().max(), b.double().abs().max().clamp(min=1)
            assert error <= tolerance * size, f"tensor {i}: error {error:.2e} beside {size:.2e}"
