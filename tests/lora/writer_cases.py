"""What the tests of writing by gradient steps share."""

import torch
from matrix import ARCHITECTURES

import memlayers as ml

TEXT = 17
LLAMA, GPT2 = ARCHITECTURES[0], ARCHITECTURES[3]


def wrapped(architecture=LLAMA, dtype=torch.float32, shake=0.0, r=3, **writer):
    """A model with a LoRA memory; `shake` moves what is learned off its start."""
    model = architecture.build().eval().to(dtype)
    fields = {"steps": 2, "learning_rate": 0.01, "segment_length": 5, **writer}
    torch.manual_seed(1)
    memory = ml.attach(model, ml.LoRAMemoryConfig(r=r, lora_alpha=6, writer=fields), name="notes").to(dtype)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return model, memory


def values(state):
    return list(state["notes"].values())
