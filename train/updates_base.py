"""Makes the base of the fact updates: a 2-layer Llama that reads ordinary text and recalls what was last said of a subject.

    python train/updates_base.py --text ../shared/texts/pride_and_prejudice_pg1342.txt --out runs/updates_base

It is trained from scratch on a mixture of the text and of histories of 1 to 16 statements, all in its attention (regime F).
From a random start such a model had not begun to match subjects after 250 to 400 steps, so it starts with an induction head in
its weights, as mimetic initialisation (2305.09828) starts attention with what trained models have: layer 0 attends to the
token before and copies it into a space of its own, layer 1 compares that space with its own token and copies what stands
where they agree. The tokenizer is the one of memlayers/demo/base.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from memlayers.loading import load_tokenizer
from memlayers.tasks import UpdatesConfig, make_task, rng_for

WIDTH, HEADS, THETA = 64, 2, 1e5
MOST = 16  # statements of a history


def make_model(tokenizer) -> LlamaForCausalLM:
    """The start: random, but for the attention of an induction head."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    write_induction_head(model)
    return model


@torch.no_grad()
def write_induction_head(model: LlamaForCausalLM) -> None:
    """Layer 0: the token before, found by position. Layer 1: where the token before was this one."""
    first, second = (layer.self_attn for layer in model.model.layers)
    size = WIDTH // HEADS
    model.model.embed_tokens.weight.normal_(std=0.1)
    same = F.normalize(torch.randn(WIDTH), dim=0)  # what all tokens have, so that positions can be asked for
    model.model.embed_tokens.weight.add_(0.8 * same)
    rest = torch.eye(WIDTH) - same[:, None] * same

    # Rotary angles of query and key differ by one position, in the four fastest pairs.
    for projection, shift in ((first.q_proj, -1.0), (first.k_proj, 0.0)):
        projection.weight.normal_(std=0.01)
        for head in range(HEADS):
            for pair in range(4):
                angle, row = shift * THETA ** (-pair / (size // 2)), head * size + pair
                projection.weight[row] += math.cos(angle) * same
                projection.weight[row + size // 2] += math.sin(angle) * same
    value, out = _orthogonal(), _orthogonal()
    moved = out @ value
    first.v_proj.weight.copy_(value @ rest)
    first.o_proj.weight.copy_(0.2 * out)

    # The slow pairs compare contents, whatever the distance.
    slow = torch.tensor([float(row % (size // 2) >= 6) for row in range(size)]).repeat(HEADS)[:, None]
    compare = slow * _orthogonal()
    second.q_proj.weight.copy_(1.3 * compare @ rest)
    second.k_proj.weight.copy_(1.3 * compare @ rest @ moved.T)
    value = _orthogonal()
    second.v_proj.weight.copy_(value)
    second.o_proj.weight.copy_(value.T)


def _orthogonal() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/updates_base"))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    lengths, started = random.Random(args.seed), time.process_time()

    tokenizer = load_tokenizer("memlayers/demo/base")
    text = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    # Statements that say again what is so have an answer inside the history.
    kinds = ({"updates": 0.2, "repeats": 0.5}, {"updates": 0.5, "repeats": 0.2})
    tasks = [make_task(UpdatesConfig(**kind), tokenizer, "train") for kind in kinds]
    objects = torch.zeros(len(tokenizer), dtype=torch.bool)
    objects[[tasks[0].speller.ids(f" {each}")[0] for each in tasks[0].objects]] = True

    model = make_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    right = 0.0
    for step in range(args.steps):
        task = tasks[step % 2]
        length = task.length_for(lengths.choice([2, 4, 8, MOST, MOST]))
        items = [
            task.sample(rng_for("train", args.seed, step * args.batch + i), length) for i in range(args.batch)
        ]
        told = torch.tensor([s.context + s.questions[0].ids + s.questions[0].answer_ids for s in items])
        at = torch.randint(len(text) - 128, (8,))
        losses, hits = _losses(model, told)
        asked = objects[told[:, 1:]]
        prose, _ = _losses(model, torch.stack([text[i : i + 128] for i in at.tolist()]))
        loss = losses[asked].mean() + losses[:, -2].mean() + 0.05 * losses.mean() + 0.5 * prose.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = 0.95 * right + 0.05 * hits[:, -2].float().mean().item()
        if step % 50 == 49:
            seconds = time.process_time() - started
            print(
                f"step {step + 1}  right {right:.3f}  text {prose.mean().item():.3f}  {seconds:.0f} s",
                flush=True,
            )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def _losses(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token losses (rows, tokens - 1), and which of them the model has right."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), logits.argmax(-1) == ids[
        :, 1:
    ]


if __name__ == "__main__":
    main()
