"""Looking at a model: its memories, its decoder and the parts of its layers."""

from __future__ import annotations

import contextlib
import inspect
import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..config import ConfigError
from .call import holding
from .linear import UnmatchedName
from .memory import DISABLED, Memory, StatefulMemory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ROOT = "memlayers"
"""Name of the child module that `attach` adds to a model."""
ATTENTION_NAMES = (
    *("self_attn", "attn", "attention", "self_attention", "norm_attn_norm.attn"),
    *("linear_attn", "mamba", "conv", "mixer"),
)
"""What architectures call the attention of a decoder layer; then, what stands in its place in hybrids."""
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
"""What architectures call the MLP of a decoder layer."""
MLP_LINEARS = (("fc1", "fc2"),)
"""What architectures call an MLP's first and last linear layer where these stand in the layer itself."""
OF_PEFT = ("base_layer", "original_module")
"""Where PEFT keeps the module that it stands around."""
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of modules in its files."""
CACHE_NAMES = ("past_key_values", "layer_past")
"""What architectures call the cache among the arguments of attention."""
SUPPORTED = (
    "decoder-only causal language models (Llama, Qwen, Mistral, GPT-2, GPT-NeoX, Gemma, Phi and their like)"
)


class Memories(nn.ModuleDict):
    """The memories of one model by name: the child module that `attach` adds.

    Attributes:
        key: tells this model's caches from those of others.
        base_requires_grad: what the base's parameters had before.
        hooks: what stands on the whole model; `handles`, by memory, on its parts, put for `adapters` of PEFT (`follow`).
    """

    def __init__(self, key: str):
        super().__init__()
        self.key = key
        self.base_requires_grad: dict[str, bool] = {}
        self.hooks: list = []
        self.handles: dict[str, list] = {}
        self.adapters: tuple = (None, ())

    def named_modules(self, *args, **kwargs):
        """As of any module, under names that PEFT does not match with those of the base."""
        return ((UnmatchedName(name), module) for name, module in super().named_modules(*args, **kwargs))

    def __setstate__(self, state: dict) -> None:
        """A deep copy, or what comes out of a pickle, is a model of its own, whose caches are its own."""
        super().__setstate__(state)
        self.key = uuid.uuid4().hex

    def enabled(self) -> dict[str, Memory]:
        """Those that take part in a call, by name."""
        return {name: memory for name, memory in self.items() if memory.enabled}


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside wrappers: `PeftModel`, DDP and its like, what `torch.compile` returns."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def memories(model: nn.Module) -> dict[str, Memory]:
    """The memories of a model by name; {} for a plain model."""
    root = getattr(unwrap(model), ROOT, None)
    return dict(root.items()) if isinstance(root, Memories) else {}


def stateful(model: nn.Module) -> dict[str, StatefulMemory]:
    """The enabled memories that keep a state, by name; all have one schedule."""
    return {n: m for n, m in memories(model).items() if m.enabled and isinstance(m, StatefulMemory)}


def written_by_gradient(model: nn.Module) -> bool:
    """Whether the memories that keep a state are written by gradient steps and not by forward calls."""
    return any(m.gradient_writer is not None for m in stateful(model).values())


def reach(model: nn.Module) -> int | None:
    """Text tokens that attention reaches where a memory says how many; None where it is as in the base."""
    return next((m.schedule.reach for m in stateful(model).values()), None)


@contextlib.contextmanager
def disabled(model: nn.Module, *names: str):
    """Run the model without the named memories, or without any when none is named, in this thread.

    Raises:
        KeyError: no memory of that name.
    """
    present = memories(model)
    check_present(present, names)
    with holding(DISABLED, DISABLED.get() | {present[name] for name in names or present}):
        yield model


def without_state(model: nn.Module):
    """Run the model without the memories that keep a state; the others stay."""
    return holding(DISABLED, DISABLED.get() | set(stateful(model).values()))


def check_present(present: dict[str, Memory], names: Iterable[str]) -> None:
    """Raise KeyError for a name that no memory has."""
    for name in names:
        if name not in present:
            raise KeyError(f"no memory named {name!r} in this model; it has {sorted(present) or 'none'}")


def memory_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (as in the model's state dict) and parameters of all memories."""
    for name, parameter in unwrap(model).named_parameters():
        if name.startswith(f"{ROOT}."):
            yield name, parameter


def value_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tables of a model's memories, shared ones once, by their names in its state dict."""
    tables = {id(p) for memory in memories(model).values() for p in memory.tables().values()}
    return {name: p for name, p in unwrap(model).named_parameters() if id(p) in tables}


def sparse_gradients(model: nn.Module, on: bool = True) -> None:
    """Make the gradients of all tables row-sparse (`torch.sparse_coo`), or dense again."""
    for memory in memories(model).values():
        memory.sparse_gradients(on)


def frozen_parameters(model: nn.Module) -> set[str]:
    """Names, in the model's state dict, of the memories' parameters that their configs say are not to learn."""
    return {
        f"{ROOT}.{n}.{own}" for n, memory in memories(model).items() for own in memory.frozen_parameters()
    }


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the model without its memories."""
    return (item for item in model.named_parameters() if not item[0].startswith(f"{ROOT}."))


def window(model: PreTrainedModel) -> int:
    """Text tokens that attention can reach: the segment length, the sliding window that a memory asks for, or the
    positions of a plain model."""
    return reach(model) or max_positions(model) or 0


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The config of the decoder, also where it is part of a multimodal model's."""
    return model.config.get_text_config(decoder=True)


def max_positions(model: nn.Module) -> int | None:
    """Positions a model or its decoder was made for, or None if its config does not say."""
    limit = getattr(text_config(unwrap(model)), "max_position_embeddings", None)
    return None if limit is None or limit <= 0 else limit  # some say that they have no limit by -1


def has_position_table(decoder: nn.Module) -> bool:
    """Whether positions are looked up in a table, not turned: the table has an end."""
    return not hasattr(decoder, "rotary_emb")


def new_cache(decoder: nn.Module, whole: bool = False) -> Cache:
    """An empty cache for a decoder's keys and values, and for the states of layers without attention.

    Args:
        whole: keep all keys and values, also where a layer's own sliding window would not.
    """
    cache = DynamicCache(config=text_config(decoder))
    if whole:
        sliding = [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers]
        cache.layers = [DynamicLayer() if s else layer for s, layer in zip(sliding, cache.layers)]
    return cache


def device_of(model: nn.Module) -> torch.device:
    """Where ids and new modules belong: the device of the input embeddings, or, where accelerate keeps those elsewhere,
    the one that they run on."""
    embeddings = unwrap(model).get_input_embeddings()
    device = next(embeddings.parameters()).device  # its `weight` may be computed by PEFT
    if device.type != "meta":
        return device
    on = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if on is None else on)


@torch.no_grad()
def embedded(model: nn.Module, n_tokens: int) -> torch.Tensor:
    """Embeddings (1, n, width) of the first token ids, whatever stands around the embedding."""
    embeddings = unwrap(model).get_input_embeddings()
    n_tokens = min(text_config(unwrap(model)).vocab_size, n_tokens)
    return embeddings(torch.arange(n_tokens, device=device_of(model))[None])


def embedding_std(model: nn.Module) -> float:
    """Standard deviation of a model's input embeddings: the size at which tokens of a memory enter it."""
    return embedded(model, 1000).float().std().item()


def embedding_width(model: nn.Module) -> int:
    """Width of a model's input embeddings."""
    return embedded(model, 1).shape[-1]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: no dropout."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The stack of decoder layers inside a causal language model.

    Raises:
        TypeError: there is none; says what is supported.
    """
    from transformers import PreTrainedModel  # takes seconds to import; whoever has a model has it already

    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"memlayers works on Hugging Face models, got {type(model).__name__}; supported: {SUPPORTED}"
        )
    causal = model.can_generate() and not model.config.is_encoder_decoder
    found = [model.get_decoder(), model.base_model, getattr(model, "model", None)] if causal else []
    found = [
        d
        for d in found
        if isinstance(d, PreTrainedModel) and d is not model and decoder_layers(d) is not None
    ]
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no decoder stack under a language-model head; supported: {SUPPORTED}, "
            "loaded with AutoModelForCausalLM"
        )
    return found[0]


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The list of layers of a decoder, whatever it is called; None if there is none."""
    n_layers = getattr(decoder.config, "num_hidden_layers", None)
    lists = [
        child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == n_layers
    ]
    return lists[0] if lists else None


def without_adapters(module: nn.Module) -> nn.Module:
    """The base's own module inside of what PEFT has put around it."""
    while True:
        inner = next((m for name in OF_PEFT if (m := module._modules.get(name)) is not None), None)
        if inner is None:
            return module
        module = inner


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """The attention of a decoder layer.

    Raises:
        ConfigError: it has none under a name we know.
    """
    return _part_of(model, layer, "attention", ATTENTION_NAMES)


def cache_name(attention: nn.Module) -> str | None:
    """What an attention calls the cache among its arguments."""
    known = inspect.signature(type(attention).forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def mlp_of(model: nn.Module, layer: int) -> tuple[nn.Module, nn.Module]:
    """The first and the last module of a decoder layer's MLP; one and the same where the MLP is a module.

    Raises:
        ConfigError: it has none under a name we know.
    """
    block = decoder_layers(decoder_of(model))[layer]
    for first, last in MLP_LINEARS:
        if isinstance(getattr(block, first, None), nn.Module) and isinstance(
            getattr(block, last, None), nn.Module
        ):
            return getattr(block, first), getattr(block, last)
    mlp = _part_of(model, layer, "MLP", MLP_NAMES)
    return mlp, mlp


def _part_of(model: nn.Module, layer: int, what: str, names: tuple[str, ...]) -> nn.Module:
    block = decoder_layers(decoder_of(model))[layer]
    for name in names:
        with contextlib.suppress(AttributeError):
            return block.get_submodule(name)
    raise ConfigError(
        f"layers: layer {layer} of {type(unwrap(model)).__name__} has no {what} called {', '.join(names)}; "
        f"it has {', '.join(name for name, _ in block.named_children())}"
    )
