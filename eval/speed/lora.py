"""LoRA memory beside the model that reads the text itself, and beside PEFT.

    OMP_NUM_THREADS=1 memlayers bench lora --output eval/speed/results/lora_cpu.json

A random Llama of 2 layers of width 256, float32; adapters of rank 16 on all its linear layers. All arms in every round;
from 4,096 tokens on and for `outer step`, which take seconds, a quarter of the rounds.

`256 tokens` and so on: one text. `write` is `ml.write` with 4 steps of AdamW and segments of 256 tokens, all at once or
`streaming`, 4 steps on each. `PEFT` takes the same 4 steps on the same segments with PEFT's layers and
`torch.optim.AdamW`, to the same losses (tests/eval/test_lora_benchmark.py). `forward` is the plain base on the same
segments, without gradients; `forward and backward` has the loss and the gradients of all its parameters.
`answer` asks a question of 16 tokens with the adapter alone and generates 8 tokens; `read and answer` is the plain base
with text and question in its context and a key-value cache. `questions until writing pays`: one text written and n
questions answered take as long as n times `read and answer`; empty where an answer from the adapter saves no time. A
random model of this size says nothing about answers, and its attention is a larger share of its work than a large one's,
so that reading a long text again costs it more than it costs those.

`rows`: 8 texts with an adapter each. One call with a state of 8 rows, 8 calls of one row, and PEFT's mixed batch
(`adapter_names=`), to the same logits; the base without adapters. `forward`: 8 × 64 tokens; `generate`: 16 tokens after 16.

`outer step`: see `memlayers.eval.speed.lora_outer`. `peak MB`: what PyTorch holds at the most during one call, above what
it held before (see `peak_memory`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import memlayers as ml
from memlayers.eval.speed.lora_outer import compare_outer_steps
from memlayers.eval.speed.lora_peft import mixed_batch, with_adapters, write_with_peft
from memlayers.eval.speed.timing import peak_memories, percentiles, time_rounds, where
from memlayers.writing import of_text

LENGTHS = (256, 1024, 4096, 8192)
LONG = 4096
"""Tokens from which on a quarter of the rounds is run."""
NAME = "notes"
VOCAB = 1024
WRITE, STREAM, PEFT = "write", "write, streaming", "PEFT"
FORWARD, BACKWARD = "forward", "forward and backward"
ANSWER, READ = "answer", "read and answer"


def random_base(width: int, layers: int, device: str, vocab_size: int = VOCAB, **config) -> PreTrainedModel:
    """A Llama that never ends a text by itself, in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16_384,
        bos_token_id=None,
        eos_token_id=None,
        **config,
    )
    return LlamaForCausalLM(config).eval().to(device)


def with_memory(base: PreTrainedModel, r: int = 16, **writer) -> PreTrainedModel:
    """A copy of `base` with a LoRA memory, its start drawn the same way in every call."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    ml.attach(model, ml.LoRAMemoryConfig(r=r, writer=writer), name=NAME)
    return model.to(base.device)


def random_ids(rows: int, tokens: int, device: str) -> torch.Tensor:
    """(rows, tokens) int64."""
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(tokens)).to(device)


def generate(model, ids: torch.Tensor, new_tokens: int, **options) -> torch.Tensor:
    """`new_tokens` more, greedily."""
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options
    )


def document_arms(
    base: PreTrainedModel, length: int, segment_length: int, steps: int, question: int, new_tokens: int
) -> dict[str, Callable]:
    """What is timed on one text, `length` tokens of which are predicted."""
    device = base.device
    model = with_memory(base, steps=steps, segment_length=segment_length)
    stream = with_memory(base, steps=steps, segment_length=segment_length, streaming=True)
    peft = with_adapters(base, ml.memories(model)[NAME], ["default"])
    trained = copy.deepcopy(base)  # its gradients are its own
    text, asked = random_ids(1, length + 1, device), random_ids(1, question, device)
    segments = of_text(text, torch.ones_like(text, dtype=torch.bool), segment_length)
    labels = segments.ids[0].masked_fill(~segments.learned[0], -100)
    state = ml.write(model, text)

    @torch.no_grad()
    def forward():
        return base(segments.ids[0], use_cache=False).logits

    def backward():
        trained(segments.ids[0], labels=labels, use_cache=False).loss.backward()
        trained.zero_grad(set_to_none=True)

    return {
        WRITE: lambda: ml.write(model, text),
        STREAM: lambda: ml.write(stream, text),
        PEFT: lambda: write_with_peft(peft, ml.memories(model)[NAME], segments.ids[0], labels),
        FORWARD: forward,
        BACKWARD: backward,
        ANSWER: lambda: generate(model, asked, new_tokens, past_key_values=state.to_cache()),
        READ: lambda: generate(base, torch.cat([text, asked], dim=1), new_tokens),
    }


def compare_document(
    length: int,
    rounds: int,
    device: str,
    width=256,
    layers=2,
    segment_length=256,
    steps=4,
    question=16,
    new_tokens=8,
) -> dict:
    """One text: writing against a forward pass, answering against reading again; all arms up to `LONG` tokens, beyond
    that what the break-even needs."""
    arms = document_arms(
        random_base(width, layers, device), length, segment_length, steps, question, new_tokens
    )
    if length > LONG:
        arms = {name: arms[name] for name in (WRITE, FORWARD, ANSWER, READ)}
    rounds = rounds if length < LONG else max(rounds // 4, 1)
    peaks = peak_memories(arms, device)  # warms up too
    seconds = time_rounds(arms, rounds, warm_up=0)
    writing = [name for name in (WRITE, STREAM, PEFT, FORWARD, BACKWARD) if name in arms]
    saved = percentiles((seconds[READ] - seconds[ANSWER]) / seconds[WRITE])
    return {
        "work": f"{length} tokens in segments of {segment_length}, {steps} steps of AdamW, rank 16; width {width}, "
        f"{layers} layers; {question} tokens asked, {new_tokens} generated",
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        "tokens/s": {name: percentiles(length / seconds[name]) for name in writing},
        "times forward": {
            name: percentiles(seconds[name] / seconds[FORWARD]) for name in writing if name != FORWARD
        },
        "times write": {PEFT: percentiles(seconds[PEFT] / seconds[WRITE])} if PEFT in arms else {},
        "times answer": {READ: percentiles(seconds[READ] / seconds[ANSWER])},
        "writings saved by an answer": saved,
        "questions until writing pays": {"p50": 1 / saved["p50"]} if saved["p50"] > 0 else {},
        "peak MB": {name: peak / 1e6 for name, peak in peaks.items()},
        "peak over forward": {name: peaks[name] / peaks[FORWARD] for name in writing if name != FORWARD},
    }


def row_arms(
    base: PreTrainedModel, rows: int, tokens: int, asked: int, new_tokens: int
) -> dict[str, Callable]:
    """`rows` texts with an adapter each: what is timed, by part and arm. Each gives logits (rows, tokens, vocabulary) or
    ids (rows, tokens)."""
    model, device = with_memory(base), base.device
    generator = torch.Generator().manual_seed(2)
    fields = {  # as far from the start as writing takes them
        field: x.cpu() + 0.02 * torch.randn(x.shape, generator=generator)
        for field, x in ml.memories(model)[NAME].new_state(rows).items()
    }
    state = ml.MemoryState({NAME: fields}).to(device)
    singles = [state.select([row]) for row in range(rows)]
    peft, names = mixed_batch(base, ml.memories(model)[NAME], state[NAME])
    text, prompt = random_ids(rows, tokens, device), random_ids(rows, asked, device)

    def forward(called, **options):
        return torch.no_grad()(lambda: called(input_ids=text, use_cache=False, **options).logits)

    @torch.no_grad()
    def one_by_one():
        return torch.cat(
            [
                model(row[None], memory_state=own, use_cache=False).logits
                for row, own in zip(text, singles, strict=True)
            ]
        )

    def generate_one_by_one():
        parts = [
            generate(model, row[None], new_tokens, past_key_values=own.to_cache())
            for row, own in zip(prompt, singles, strict=True)
        ]
        return torch.cat(parts)

    return {
        "forward: one call": forward(model, memory_state=state),
        "forward: one by one": one_by_one,
        "forward: PEFT": forward(peft, adapter_names=names),
        "forward: base": forward(base),
        "generate: one call": lambda: generate(model, prompt, new_tokens, past_key_values=state.to_cache()),
        "generate: one by one": generate_one_by_one,
        "generate: PEFT": lambda: generate(peft, prompt, new_tokens, adapter_names=names),
        "generate: base": lambda: generate(base, prompt, new_tokens),
    }


def compare_rows(
    rounds: int, device: str, width=256, layers=2, rows=8, tokens=64, asked=16, new_tokens=16
) -> dict:
    """A batch of rows with adapters of their own against single calls and PEFT's mixed batch."""
    arms = row_arms(random_base(width, layers, device), rows, tokens, asked, new_tokens)
    peaks = peak_memories(arms, device)
    seconds = time_rounds(arms, rounds)
    ours = {name: f"{name.partition(':')[0]}: one call" for name in arms}
    return {
        "work": f"{rows} rows with an adapter of rank 16 each: forward of {tokens} tokens, or {new_tokens} generated "
        f"after {asked}; width {width}, {layers} layers",
        "rounds": rounds,
        "ms": {name: percentiles(1e3 * found) for name, found in seconds.items()},
        "times one call": {
            name: percentiles(seconds[name] / seconds[own]) for name, own in ours.items() if name != own
        },
        "peak MB": {name: peak / 1e6 for name, peak in peaks.items()},
    }


def benchmark(rounds: int = 20, device: str = "cpu") -> dict:
    """All of it, as the JSON that is committed."""
    return {
        **{f"{length} tokens": compare_document(length, rounds, device) for length in LENGTHS},
        "rows": compare_rows(rounds, device),
        "outer step": compare_outer_steps(max(rounds // 4, 1), device),
        **where(device, "peft", "transformers"),
        "not installed": [],
    }
