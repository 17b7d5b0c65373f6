"""Looking at a model: its memories, its decoder, its window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from .config import ConfigError
from .memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = "memlayers"
"""Name of the child module that `attach` adds to a model."""
ATTENTION_NAMES = ("self_attn", "attn", "attention")
"""What architectures call the attention of a decoder layer."""
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
"""What architectures call the MLP of a decoder layer."""
SUPPORTED = (
    "decoder-only causal language models (Llama, Qwen, Mistral, GPT-2, GPT-NeoX, Gemma, Phi and their like)"
)


class Memories(nn.ModuleDict):
    """The memories of one model by name: the child module that `attach` adds."""

    def __init__(self):
        super().__init__()
        self.base_requires_grad: dict[str, bool] = {}
        self.handles: dict[str, list] = {}


def bare(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a `PeftModel`; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def memories(model: nn.Module) -> dict[str, Memory]:
    """The memories of a model by name; {} for a plain model."""
    root = getattr(bare(model), ROOT, None)
    return dict(root.items()) if isinstance(root, Memories) else {}


def segmented(model: nn.Module) -> dict[str, Memory]:
    """The enabled memories that read in segments, by name."""
    return {n: m for n, m in memories(model).items() if m.enabled and m.segment_length is not None}


def stateful(model: nn.Module) -> dict[str, Memory]:
    """The enabled memories that keep a state, by name. They all read in segments, or all stream."""
    return {n: m for n, m in memories(model).items() if m.enabled and m.keeps_state}


def by_gradient(model: nn.Module) -> bool:
    """Whether the memories that keep a state are written by gradient steps and not by forward calls."""
    return any(m.by_gradient for m in stateful(model).values())


def windowed(model: nn.Module) -> bool:
    """Whether a memory keeps attention within a window of its own."""
    return any(m.segment_length is not None or m.sliding_window is not None for m in stateful(model).values())


def memory_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (as in the model's state dict) and parameters of all memories."""
    for name, parameter in bare(model).named_parameters():
        if name.startswith(f"{ROOT}."):
            yield name, parameter


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the model without its memories."""
    return (item for item in model.named_parameters() if not item[0].startswith(f"{ROOT}."))


def window(model: PreTrainedModel) -> int:
    """Text tokens that attention can reach: the segment length, the sliding window that a memory asks for, or the
    positions of a plain model."""
    for memory in stateful(model).values():
        reach = memory.segment_length or memory.sliding_window
        if reach is not None:
            return reach
    return max_positions(model) or 0


def max_positions(model: PreTrainedModel) -> int | None:
    """Positions the model was made for, or None if its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: no dropout."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The stack of decoder layers inside a causal language model.

    Raises:
        TypeError: there is none; says what is supported.
    """
    from transformers import PreTrainedModel  # takes seconds to import; whoever has a model has it already

    model = bare(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"memlayers works on Hugging Face models, got {type(model).__name__}; supported: {SUPPORTED}"
        )
    causal = model.can_generate() and not model.config.is_encoder_decoder
    decoder = model.get_decoder() if causal else None
    if decoder is None or decoder is model or decoder_layers(decoder) is None:
        raise TypeError(
            f"{type(model).__name__} has no decoder stack under a language-model head; supported: {SUPPORTED}, "
            "loaded with AutoModelForCausalLM"
        )
    return decoder


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The list of layers of a decoder, whatever it is called; None if there is none."""
    n_layers = getattr(decoder.config, "num_hidden_layers", None)
    lists = [
        child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == n_layers
    ]
    return lists[0] if lists else None


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """The attention of a decoder layer.

    Raises:
        ConfigError: it has none under a name we know.
    """
    return _part_of(model, layer, "attention", ATTENTION_NAMES)


def mlp_of(model: nn.Module, layer: int) -> nn.Module:
    """The MLP of a decoder layer.

    Raises:
        ConfigError: it has none under a name we know.
    """
    return _part_of(model, layer, "MLP", MLP_NAMES)


def _part_of(model: nn.Module, layer: int, what: str, names: tuple[str, ...]) -> nn.Module:
    block = decoder_layers(decoder_of(model))[layer]
    for name in names:
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    raise ConfigError(
        f"layers: layer {layer} of {type(model).__name__} has no {what} called {', '.join(names)}; "
        f"it has {', '.join(name for name, _ in block.named_children())}"
    )
