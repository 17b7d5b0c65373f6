"""Makes the tiny base of the evaluation of procedures: it does what definitions say, and knows names by heart.

    python train/procedures_base.py --seed 0 --out runs/procedures_base/seed0

A Llama is trained from scratch on `ProceduresTask.pretraining` alone: uses of procedures with their definition in the
prompt, and of known ones without. The loss is that of the words and the answer. It never sees a name or a composition of
those that are to be learned later. OUT gets the model, its tokenizer, procedures.json (the config of the procedures) and
README.md with what it can do.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from memlayers.files import write_text
from memlayers.tasks.procedures import Procedure, ProceduresConfig, ProceduresTask, Use

CONFIG = "procedures.json"


def make_model(task: ProceduresTask, args: argparse.Namespace) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(task.tokenizer),
            hidden_size=args.width,
            intermediate_size=2 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=task.tokenizer.eos_token_id,
            pad_token_id=task.tokenizer.pad_token_id,
        )
    )


def collate(uses: Sequence[Use]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (uses, tokens), padded on the right, and which of them are words or answer."""
    rows = [[*use.prompt, *use.words, *use.answer] for use in uses]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for at, (use, row) in enumerate(zip(uses, rows)):
        ids[at, : len(row)] = torch.tensor(row)
        learned[at, len(use.prompt) : len(row)] = True
    return ids, learned


@torch.no_grad()
def right(model, uses: Sequence[Use]) -> float:
    """Share of uses of which every token of words and answer is the most likely one, the right ones before it given."""
    ids, learned = collate(uses)
    best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    return ((best == ids[:, 1:]) | ~learned[:, 1:]).all(-1).float().mean().item()


def measure(model, task: ProceduresTask, n: int) -> dict[str, float]:
    """What the base can do, with symbols that training never had."""
    rng = random.Random(f"memlayers:procedures:measured:{task.config.seed}")
    new = task.new(64, task.config.seed)
    compounds = [Procedure(p.name, (word,)) for p, word in zip(new, task.compounds.values())]
    measured = {
        "held-out compositions, defined in the prompt": (new, True),
        "compounds, defined in the prompt": (compounds, True),
        "known names": (task.known, False),
    }
    return {
        name: right(model, [task.use(p, task.draw(rng, "eval"), told) for p in rng.choices(of, k=n)])
        for name, (of, told) in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--simple", type=int, default=300, help="first steps, on one order or one map each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--items", type=int, default=1000, help="uses to measure on, of each sort")
    args = parser.parse_args()
    started = time.process_time()
    torch.manual_seed(args.seed)
    task = ProceduresTask(ProceduresConfig(seed=args.seed))
    model = make_model(task, args)
    rng = random.Random(f"memlayers:pretraining:{args.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    for step in range(args.steps):
        simple = step < args.simple
        ids, learned = collate([task.pretraining(rng, simple) for _ in range(args.batch)])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits[learned[:, 1:]], ids[:, 1:][learned[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            shares = ", ".join(f"{name} {share:.3f}" for name, share in measure(model, task, 256).items())
            seconds = time.process_time() - started
            print(f"step {step + 1}  loss {loss.item():.3f}  {shares}  {seconds:.0f} s", flush=True)

    found = measure(model, task, args.items)
    model.save_pretrained(args.out)
    task.tokenizer.save_pretrained(args.out)
    write_text(args.out / CONFIG, json.dumps(task.config.model_dump(), indent=2) + "\n")
    rows = "\n".join(f"| {name} | {share:.3f} |" for name, share in found.items())
    write_text(
        args.out / "README.md",
        f"# A tiny base that does procedures\n\nMade by `python train/procedures_base.py --seed {args.seed} --steps "
        f"{args.steps}`: {model.num_parameters():,} parameters, {time.process_time() - started:.0f} s of the CPU. Words and "
        f"answer all right, of {args.items} uses each:\n\n| | share |\n|---|---|\n{rows}\n",
    )
    print(f"{args.out}: {found}, {time.process_time() - started:.0f} s")


if __name__ == "__main__":
    main()
