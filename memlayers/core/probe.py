"""`probe`: a few tokens through a model, to see that a memory just attached is read, written and decoded with."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..config import ConfigError
from .call import holding
from .hooks import SEEN, LayerHook, PartHook
from .masks import positions_of
from .memory import LayerMemory, Memory, StatefulMemory, fresh_state
from .model import (
    ROOT,
    SUPPORTED,
    device_of,
    disabled,
    eval_mode,
    memories,
    stateful,
    text_config,
    unwrap,
)
from .state import MemoryState

N_TOKENS = 3
LARGEST = 10_000_000
"""Elements of the largest parameter whose gradient is looked at: a table of a billion values is not differentiated."""
_tried: set[int] = set()


def probe(model: nn.Module, name: str) -> None:
    """Try memory `name` of a model. What was tried in this process on the same architecture is not tried again.

    Looks at whether all hooks of the memory find the pass that they are in, a text that is written changes the state, what
    is read reaches the logits, a token after a cache gives what the whole text gives, and a row behind padding what it
    gives alone, both where the base does so. Nothing stays: no gradient, no
    random number drawn, no module in another mode.

    Raises:
        ConfigError: one of these does not hold; says which, and for what architecture.
    """
    model = unwrap(model)
    memory, key = memories(model)[name], _fingerprint(model)
    if key in _tried or any(p.is_meta for p in memory.parameters()):
        return
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices), eval_mode(model), torch.inference_mode(False):
        for what, step in STEPS.items():
            try:
                problem = step(model, name, memory)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                raise ConfigError(
                    f"type: a memory of kind {memory.config.type} does not work in {type(model).__name__} "
                    f"({text_config(model).model_type}): {what}: {problem}. Supported: {SUPPORTED}"
                ) from None
    _tried.add(key)


def _text(model: nn.Module, n_tokens: int = N_TOKENS) -> torch.Tensor:
    """(2, n_tokens) ids that every vocabulary has."""
    ids = torch.arange(2 * n_tokens).view(2, n_tokens) + 3
    return (ids % text_config(model).vocab_size).to(device_of(model))


@torch.no_grad()
def _has_cache(model: nn.Module, name: str, memory: Memory) -> str | None:
    """Whether the base keeps keys and values, beside which memory is carried."""
    with disabled(model):
        output = model(_text(model), use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        return "it keeps no keys and values (`past_key_values`), beside which memory is carried from call to call"
    return None


@torch.no_grad()
def _is_written(model: nn.Module, name: str, memory: Memory) -> str | None:
    """Whether its hooks find the pass, and writing changes the state."""
    by_reading = isinstance(memory, StatefulMemory) and memory.gradient_writer is None
    seen: set = set()
    with holding(SEEN, seen):
        output = model(_text(model), use_cache=False, **({"close_memory": True} if by_reading else {}))
    root = getattr(model, ROOT)
    hooks = [hook for hook in root.handles[name] if isinstance(hook, PartHook)]
    if isinstance(memory, LayerMemory):
        hooks += [h for h in root.hooks if isinstance(h, LayerHook) and h.layer in memory.at_layers]
    missed = [hook for hook in hooks if hook not in seen]
    if missed:
        part = getattr(missed[0], "part", "layer")
        return (
            f"the {part} of layer {missed[0].layer} was not called as a module, so that the memory in it never ran; leave "
            "it out of the config's layers or target_modules"
        )
    if not by_reading:
        return None
    before, after = memory.new_state(2), output.memory_state[name]
    same = all(after[f].shape == x.shape and torch.equal(after[f], x) for f, x in before.items())
    return "a text that was written left the state as it was" if same else None


def _is_read(model: nn.Module, name: str, memory: Memory) -> str | None:
    """Whether the logits have a gradient towards what the memory holds, or has learned."""
    ids, state, held = _text(model), None, []
    if any(p.is_inference() for p in model.parameters()):
        return None
    if isinstance(memory, StatefulMemory):
        state = _written(model, name, memory, ids)
        fields = {f: x.clone().requires_grad_(x.is_floating_point()) for f, x in state[name].items()}
        state = state.replace({name: fields})
        held = [x for x in fields.values() if x.requires_grad]
    held += [p for p in memory.parameters() if p.requires_grad and p.numel() <= LARGEST]
    if not held:
        return None
    with torch.enable_grad():
        given = {} if state is None else {"memory_state": state}
        logits = model(ids, use_cache=False, **given).logits[:, -1].float()
        direction = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).sin()
        gradients = torch.autograd.grad((logits * direction).sum(), held, allow_unused=True)
    if any(g is not None and g.any() for g in gradients):
        return None
    return "what it holds does not reach the logits"


@torch.no_grad()
def _written(model: nn.Module, name: str, memory: StatefulMemory, ids: torch.Tensor) -> MemoryState:
    """A state in which something is written."""
    if memory.gradient_writer is None:
        return model(ids, use_cache=False, close_memory=True).memory_state
    return fresh_state(stateful(model), len(ids)).replace({name: memory.state_to_try(model, ids)})


def _where_the_base_does(differs: Callable, told: str) -> Callable:
    """A step that wants `differs(model, name, memory)` to be None, unless it is not in the base either."""

    @torch.no_grad()
    def step(model: nn.Module, name: str, memory: Memory) -> str | None:
        far = differs(model, name, memory)
        if far is None:
            return None
        with disabled(model):
            base = differs(model, name, None)
        return None if base is not None else f"{told}, by {far:.2g}"

    return step


def _cached_minus_whole(model: nn.Module, name: str, memory: Memory | None) -> float | None:
    """How far the logits of a token after a cache are from those of the whole text."""
    ids = _text(model)
    reading = next(iter(stateful(model).values()), None)
    flags = {"write_memory": False} if reading is not None and reading.schedule.kv == "drop" else {}
    whole = model(ids, use_cache=False, **flags).logits[:, -1]
    first = model(ids[:, :-1], use_cache=True, **flags)
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True, **flags)
    return _apart(last.logits[:, -1], whole)


def _padded_minus_alone(model: nn.Module, name: str, memory: Memory | None) -> float | None:
    """How far the logits of a row behind padding are from those of the row alone."""
    ids, given, alone = _text(model), {}, {}
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    if isinstance(memory, StatefulMemory):
        state = _written(model, name, memory, ids)
        given, alone = {"memory_state": state}, {"memory_state": state.select([1])}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = positions_of(mask)
    padded = model(ids, attention_mask=mask, use_cache=False, **given).logits[1, -1]
    return _apart(padded, model(ids[1:, 1:], use_cache=False, **alone).logits[0, -1])


def _apart(got: torch.Tensor, expected: torch.Tensor) -> float | None:
    """How far logits are apart; None where that is rounding."""
    far = (
        (got.float() - expected.float()).abs().masked_fill(got == expected, 0).max()
    )  # some are -inf, in both
    tolerance = 1e-3 if got.dtype == torch.float32 else 5e-2
    size = 1 + expected[expected.isfinite()].abs().max()
    return None if far <= tolerance * size else float(far)


STEPS = {
    "cache": _has_cache,
    "writing": _is_written,
    "reading": _is_read,
    "decoding with a cache": _where_the_base_does(
        _cached_minus_whole, "a token after a cache gives other logits than the whole text"
    ),
    "padding": _where_the_base_does(
        _padded_minus_alone, "a row behind padding gives other logits than the row alone"
    ),
}


def _fingerprint(model: nn.Module) -> int:
    """Of all that the outcome depends on: modules, the base's and the memories' configs, dtype and device."""
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    configs = tuple((name, memory.config.model_dump_json()) for name, memory in memories(model).items())
    config = text_config(model)
    base = config.to_json_string(use_diff=False), config._attn_implementation
    weight = model.get_input_embeddings().weight
    return hash((type(model), modules, configs, base, weight.dtype, weight.device.type))
