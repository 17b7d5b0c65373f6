"""Models with an adapter of PEFT and a memory, for the tests of both."""

import pytest
import torch
from matrix import KINDS, TEXT, llama, tokens, wrap
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

import memlayers as ml

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = dict(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
ADAPTERS = {
    "lora": lambda: LoraConfig(target_modules=TARGETS, **LORA),
    "dora": lambda: LoraConfig(target_modules=TARGETS, use_dora=True, **LORA),
    "rslora": lambda: LoraConfig(target_modules=TARGETS, use_rslora=True, **LORA),
    "all_linear": lambda: LoraConfig(target_modules="all-linear", **LORA),
    "ia3": lambda: IA3Config(
        target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=TARGETS, init_weights=False),
    "copy_of_v": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"], **LORA),
    "copy_of_head": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "tokens": lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[300, 301], **LORA),
}
SOME = [
    k
    for k in KINDS
    if k.name in ("recurrent", "lora", "neural_mag", "product_key", "task_tokens", "cartridge")
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
some_kinds = pytest.mark.parametrize("kind", SOME, ids=lambda kind: kind.name)
adapters = pytest.mark.parametrize("adapter", ADAPTERS)
orders = pytest.mark.parametrize("first", ["peft_first", "memory_first"])


def untied():
    """A base whose head is its own, so that PEFT may copy it."""
    base = llama().base()
    base.config.tie_word_embeddings = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    return base


def shaken(model):
    """Moves what PEFT added, copies included, off where it starts; the same on each call."""
    generator = torch.Generator().manual_seed(5)
    parts = ("lora_", "ia3_", "hada_", "oft_", "tokens_delta", "modules_to_save")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts) and not name.startswith("memlayers."):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(model, adapter, **name):
    """With an adapter in it; the same on each call."""
    torch.manual_seed(3)
    return shaken(get_peft_model(model, ADAPTERS[adapter](), **name))


def both(kind, adapter, first, base=untied):
    """A model with an adapter and memory, either of which came first."""
    if first == "peft_first":
        return wrap(adapted(base(), adapter), kind)
    return adapted(wrap(base(), kind), adapter)


@torch.no_grad()
def logits(model, kind, ids, state=None):
    """With a state that is written before, where the kind keeps one."""
    if not kind.stateful:
        return model(input_ids=ids).logits
    state = ml.write(model, tokens(2, TEXT, seed=3)) if state is None else state
    return model(input_ids=ids, memory_state=state).logits


def unadapted(model, names):
    """Nothing of PEFT is in the memories, whose parameters are called as ever."""
    assert [name for name, _ in ml.memory_parameters(model)] == names
    inside = [n for n, _ in model.named_modules() if "memlayers." in n]
    assert not [n for n in inside if any(p in n for p in ("lora_", "base_layer", "modules_to_save"))]
