"""Makes the tiny base of the demo: a byte-level tokenizer and a 2-layer Llama that recalls passkeys.

    python train/tiny_base.py --out memlayers/demo/base

The base is trained from scratch on the passkey task of memlayers.tasks alone, on sequences of at most 41
tokens, so it finds a 5-digit passkey inside a 32-token window and nothing outside it. That is all it can do:
it is there so that `make demo` shows on a laptop what a memory adds. Its weights are float32 safetensors of
less than 1 MB.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlayers.tasks import NeedleConfig, PasskeyConfig, make_task, rng_for
from memlayers.tasks.words import NOISE_SENTENCES

WINDOW = 32  # of the memory that make demo adds
LENGTHS = (23, 41)  # tokens of a training sequence; 22 hold needle, question and answer

PROSE = """The harbour town wakes before the sun. A lamp is lit in the kitchen, a door is opened, and
somebody asks what the weather will be. It will be fine, says the old man on the bench, as he has said every
morning for thirty years. What is the name of the ship? Where is the key? Who has the letter? Remember what I
told you, and keep it in mind. The number is on the box; the password is in the book. Please answer the
question: which of these is the one you want, and what was it for? This is the answer. There are many things
that we know, and more that we have forgotten.""".replace("\n", " ")


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`. Every digit is a token of its own, and any text can be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batch(task, split: str, seed: int, step: int, size: int, length: int) -> tuple[torch.Tensor, int]:
    """`size` passkey items of exactly `length` tokens: ids (size, length), and how many are the answer."""
    samples = [task.sample(rng_for(split, seed, step * size + i), length) for i in range(size)]
    rows = [s.context + s.questions[0].ids + s.questions[0].answer_ids for s in samples]
    return torch.tensor(rows), len(samples[0].questions[0].answer_ids)


def loss_of(model, ids: torch.Tensor, n_answer: int, rest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token loss of the answer plus `rest` times that of the rest; and which rows are all right."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    right = (logits[:, -n_answer:].argmax(-1) == ids[:, -n_answer:]).all(-1)
    return losses[:, -n_answer:].mean() + rest * losses[:, :-n_answer].mean(), right


@torch.no_grad()
def recall(model, tokenizer, task, n_items: int, length: int) -> float:
    """Share of eval items of `length` tokens whose answer greedy decoding spells exactly, full stop included."""
    model.eval()
    found = 0
    for start in range(0, n_items, 100):
        ids, n_answer = batch(task, "eval", 0, start // 100, min(100, n_items - start), length)
        out = model.generate(
            ids[:, :-n_answer],
            attention_mask=torch.ones_like(ids[:, :-n_answer]),
            max_new_tokens=n_answer,
            do_sample=False,
        )
        found += int((out[:, -n_answer:] == ids[:, -n_answer:]).all(-1).sum())
    model.train()
    return found / n_items


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("memlayers/demo/base"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=1000, help="items to measure recall on, at each length")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.perf_counter()

    # The tokenizer: the task's own sentences and templates, and a little prose for everything else.
    passkey = PasskeyConfig(digits=5)
    templates = [
        passkey.needle.format(key=40711) + passkey.question,
        NeedleConfig().needle,
        NeedleConfig().question,
    ]
    tokenizer = make_tokenizer([" " + s for s in NOISE_SENTENCES] * 4 + templates * 4 + [PROSE], args.vocab)
    tokenizer.model_max_length = 2048

    # The model: next-token loss on everything, four fifths of it on the answer.
    model = make_model(tokenizer).train()
    task, unseen = make_task(passkey, tokenizer, "train"), make_task(passkey, tokenizer, "eval")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    lengths = random.Random(args.seed)
    running = 0.0
    for step in range(args.steps):
        ids, n_answer = batch(task, "train", args.seed, step, args.batch, lengths.randint(*LENGTHS))
        loss, right = loss_of(model, ids, n_answer, rest=0.2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * right.float().mean().item()
        if step % 100 == 99:
            elapsed = time.perf_counter() - started
            print(
                f"step {step + 1}  loss {loss.item():.3f}  exact {running:.3f}  {elapsed:.0f} s", flush=True
            )

    # What it recalls, on keys it never saw; then the files.
    exact = {length: recall(model, tokenizer, unseen, args.items, length) for length in (24, 28, WINDOW, 40)}
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "README.md").write_text(readme(model, exact, args), encoding="utf-8")
    print(f"{args.out}: {exact} of {args.items} items each, {time.perf_counter() - started:.0f} s")


def readme(model, exact: dict[int, float], args) -> str:
    rows = "\n".join(f"| {length} | {share:.3f} | {args.items} |" for length, share in exact.items())
    config, size = model.config, f"{model.num_parameters():,}"
    return f"""# The tiny base of `memlayers demo`

A {config.num_hidden_layers}-layer, {config.hidden_size}-wide Llama ({size} parameters) with a
byte-level tokenizer of {config.vocab_size} tokens. It was trained from scratch on passkeys in sequences of {LENGTHS[0]} to
{LENGTHS[1]} tokens and can do nothing else. No text of others went into it. Made by

    python train/tiny_base.py --steps {args.steps} --seed {args.seed}

5-digit passkeys it never saw, random depth, greedy decoding, exact match up to the full stop behind the number:

| tokens | recall | items |
| --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    main()
