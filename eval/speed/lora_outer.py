"""One outer training step of a writer that learns to write (PERK), by how many inner steps its gradient passes through.

The sizes are those of configs/train/lora_passkey.yaml: the embedded base, trained along; 32 passkeys in 8 segments of 32
tokens, written by 4 inner steps into rank 16 with learned rates and token weights; the loss of the answer given the
question and the adapter, backward to all parameters. `unroll` 4 is MAML; `fomaml` goes through
no step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import memlayers as ml
from memlayers.eval.speed.timing import peak_memories, percentiles, time_rounds
from memlayers.loading import load_causal_lm, load_tokenizer
from memlayers.tasks import PasskeyConfig, make_task, rng_for

BASE = Path(ml.__file__).parent / "demo" / "base"
WRITER = {
    "steps": 4,
    "learning_rate": 1e-2,
    "segment_length": 32,
    "learned_steps": True,
    "token_weights": True,
}


def passkeys(batch: int, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Contexts (batch, tokens), questions with answers (batch, tokens), and the tokens of an answer."""
    tokenizer = load_tokenizer(BASE)
    task = make_task(PasskeyConfig(digits=5, filler="noise"), tokenizer)
    samples = [task.sample(rng_for("train", 0, item), length) for item in range(batch)]
    asked = [(*s.questions[0].ids, *s.questions[0].answer_ids) for s in samples]
    contexts = torch.tensor([s.context for s in samples], device=device)
    return contexts, torch.tensor(asked, device=device), len(samples[0].questions[0].answer_ids)


def outer_step(writer: dict, r: int, batch: int, length: int, device: str) -> Callable[[], torch.nn.Module]:
    """A function that does one step, all but the optimizer's, and gives the model with its gradients. `writer`: fields
    that differ from `WRITER`."""
    torch.manual_seed(0)
    model = load_causal_lm(BASE)
    config = ml.LoRAMemoryConfig(r=r, lora_alpha=r, writer={**WRITER, **writer})
    ml.attach(model, config, name="notes")
    model.to(device).train().requires_grad_(True)
    contexts, asked, n_answer = passkeys(batch, length, device)

    def step():
        model.zero_grad(set_to_none=False)
        state = ml.write(model, contexts, differentiable=True)
        logits = model(asked, memory_state=state, use_cache=False).logits[:, -n_answer - 1 : -1]
        F.cross_entropy(logits.flatten(0, 1), asked[:, -n_answer:].flatten()).backward()
        return model

    return step


def compare_outer_steps(rounds: int, device: str, r=16, batch=32, length=256) -> dict:
    """Milliseconds and peak memory of a step for every `unroll`, each beside the full gradient's in the same round."""
    steps = WRITER["steps"]
    fields = {f"unroll {n}": {"unroll": n} for n in range(steps, 0, -1)} | {
        "fomaml": {"outer_gradient": "fomaml"}
    }
    arms = {name: outer_step(writer, r, batch, length, device) for name, writer in fields.items()}
    peaks = peak_memories(arms, device)
    seconds = time_rounds(arms, rounds, warm_up=0)
    full = f"unroll {steps}"
    return {
        "work": f"{batch} passkeys in {length // WRITER['segment_length']} segments of {WRITER['segment_length']} "
        f"tokens, {steps} inner steps, rank {r}; the embedded base, trained along",
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        f"times {full}": {name: percentiles(found / seconds[full]) for name, found in seconds.items()},
        "peak MB": {name: peak / 1e6 for name, peak in peaks.items()},
        f"peak over {full}": {name: peak / peaks[full] for name, peak in peaks.items()},
    }
