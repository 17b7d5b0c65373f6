"""The family of token memories beside PEFT, and beside the authors of RMT and ARMT.

    OMP_NUM_THREADS=1 memlayers bench token_memories --armt associative-recurrent-memory-transformer \\
        --output eval/speed/results/token_memories_cpu.json

A random Llama of 2 layers of width 256, float32; all arms in every round. `train` is the loss of a batch and the gradients
of what trains; `generate` is greedy, with a cache.

`cartridge`: 64 learned places, the base frozen, beside PEFT's prefix tuning with the same vectors: the same logits and
gradients (tests/cartridge/test_peft.py). `checkpointing` is ours under gradient checkpointing, which PEFT refuses here.

`task tokens`: 64 rows on a base of 32,000 words with one table in and out, beside PEFT's trainable tokens on the table
resized by 64: the same logits and gradients (tests/eval/test_token_memories_benchmark.py).

`recurrent tokens`: 16 memory tokens, segments of 128, base and memory train through all of them, beside the authors' RMT:
the same logits. `associative`: 16 tokens that write, keys of width 64, beside the authors' ARMT: the same work but for our norms
of input and features, not the same numbers. Their code is on no package index: give a clone of
github.com/RodkinIvan/associative-recurrent-memory-transformer. `read` is a forward pass without gradients.

`peak MB`: what PyTorch holds at the most during one call, above what it held before (see `peak_memory`). Reversible memory
has no peer that we could run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import memlayers as ml
from memlayers.eval.speed import authors_rmt
from memlayers.eval.speed.lora import generate, random_base, random_ids
from memlayers.eval.speed.timing import compare, version_of, where

OURS, PEFT, AUTHORS, CHECKPOINTING = "memlayers", "PEFT", "the authors'", "checkpointing"


def cartridges(base: PreTrainedModel, n_tokens: int) -> tuple[PreTrainedModel, PeftModel]:
    """A base with a learned cartridge and one with PEFT's prefix, with the same vectors."""
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    memory = ml.attach(ours, ml.CartridgeConfig(n_tokens=n_tokens, start="learned", writer={"steps": 0}))
    peft = get_peft_model(theirs, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n_tokens))
    (table,) = (parameter for parameter in peft.parameters() if parameter.requires_grad)
    with torch.no_grad():  # PEFT lays keys and values of all layers and heads side by side in one row a place
        table.copy_(torch.stack([memory.keys, memory.values], 1).permute(2, 0, 1, 3, 4).reshape(table.shape))
    return ours.to(base.device), peft.eval().to(base.device)


def task_tokens(base: PreTrainedModel, n_names: int) -> tuple[PreTrainedModel, PeftModel]:
    """A base with task tokens and one with PEFT's trainable tokens behind its vocabulary, with the same rows."""
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    memory = ml.attach(ours, ml.TaskTokensConfig(names=[f"task{i}" for i in range(n_names)]))
    n_words = base.config.vocab_size
    theirs.resize_token_embeddings(n_words + n_names, mean_resizing=False)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[n_words:] = torch.stack(list(memory.rows.input.values()))
    new = TrainableTokensConfig(token_indices=list(range(n_words, n_words + n_names)))
    return ours.to(base.device), get_peft_model(theirs, new).eval().to(base.device)


def recurrent(clone: Path, base: PreTrainedModel, n_tokens: int, segment_length: int):
    """A base with recurrent tokens and the authors' RMT with the same ones; all parameters train."""
    ours = copy.deepcopy(base)
    config = ml.MemoryTokensConfig(n_tokens=n_tokens, segment_length=segment_length)
    memory = ml.attach(ours, config, freeze_base=False)
    theirs = authors_rmt.rmt(clone, base, n_tokens, segment_length)
    with torch.no_grad():
        theirs.memory_cell.memory.copy_(memory.initial_memory)
        memory.norm.weight.copy_(ours.model.norm.weight)  # theirs is what the final norm gives out
    return ours.to(base.device), theirs.eval().to(base.device)


def associative(clone: Path, base: PreTrainedModel, n_tokens: int, segment_length: int, key_dim: int):
    """A base with an associative memory and the authors' ARMT, of the same sizes; all parameters train."""
    ours = copy.deepcopy(base)
    config = ml.AssociativeMemoryConfig(n_tokens=n_tokens, segment_length=segment_length, key_dim=key_dim)
    ml.attach(ours, config, freeze_base=False)
    theirs = authors_rmt.armt(clone, base, n_tokens, segment_length, key_dim)
    return ours.to(base.device), theirs.eval().to(base.device)


def train(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One loss of ids (rows, tokens), with its gradients."""

    def once():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return once


def beside_peft(
    models: tuple[PreTrainedModel, PeftModel], ids: torch.Tensor, prompt: torch.Tensor, new_tokens: int
) -> dict[str, Callable]:
    """What is timed of two models: training on ids, and generating behind prompt, both (rows, tokens) int64."""
    arms = {}
    for name, model in zip((OURS, PEFT), models, strict=True):
        arms[f"train: {name}"] = train(model, ids)
        arms[f"generate: {name}"] = lambda model=model: generate(model, prompt, new_tokens)
    return arms


def beside_authors(models: tuple[nn.Module, nn.Module], ids: torch.Tensor) -> dict[str, Callable]:
    """What is timed of two models on ids (rows, tokens) int64."""
    arms = {}
    for name, model in zip((OURS, AUTHORS), models, strict=True):
        arms[f"train: {name}"] = train(model, ids)
        arms[f"read: {name}"] = torch.no_grad()(lambda model=model: model(input_ids=ids).logits)
    return arms


def compared(arms: dict[str, Callable], rounds: int, device: str, work: str) -> dict:
    """Every arm beside that of ours that does the same, which has its name up to the colon."""
    ours = {name: f"{name.partition(':')[0]}: {OURS}" for name in arms}
    return compare(arms, {name: own for name, own in ours.items() if name != own}, rounds, device, work)


def compare_cartridges(
    rounds: int, device: str, width=256, layers=2, n_tokens=64, rows=4, length=256, asked=32, new_tokens=32
) -> dict:
    """A learned cartridge beside PEFT's prefix tuning."""
    models = cartridges(random_base(width, layers, device), n_tokens)
    ids, prompt = random_ids(rows, length, device), random_ids(rows, asked, device)
    arms = beside_peft(models, ids, prompt, new_tokens)
    checkpointing = copy.deepcopy(models[0]).train()
    checkpointing.gradient_checkpointing_enable()
    arms[f"train: {CHECKPOINTING}"] = train(checkpointing, ids)
    return compared(
        arms,
        rounds,
        device,
        f"{n_tokens} places, {rows} × {length} tokens, or {new_tokens} generated after {asked}; width {width}, "
        f"{layers} layers",
    )


def compare_task_tokens(
    rounds: int,
    device: str,
    width=256,
    layers=2,
    vocab_size=32_000,
    n_names=64,
    rows=4,
    length=64,
    asked=32,
    new_tokens=32,
) -> dict:
    """Task tokens beside PEFT's trainable tokens; each row calls a procedure of its own."""
    base = random_base(width, layers, device, vocab_size, tie_word_embeddings=True)
    ids, prompt = random_ids(rows, length, device), random_ids(rows, asked, device)
    called = vocab_size + torch.arange(rows, device=device) % n_names
    ids[:, length // 2], prompt[:, -1] = called, called
    return compared(
        beside_peft(task_tokens(base, n_names), ids, prompt, new_tokens),
        rounds,
        device,
        f"{n_names} rows behind {vocab_size} words, {rows} × {length} tokens, or {new_tokens} generated after {asked}; "
        f"width {width}, {layers} layers",
    )


def compare_streams(
    clone: Path,
    rounds: int,
    device: str,
    width=256,
    layers=2,
    n_tokens=16,
    segment_length=128,
    key_dim=64,
    rows=2,
    length=1024,
) -> dict[str, dict]:
    """Recurrent tokens and associative memory beside the authors' code."""
    base, ids = random_base(width, layers, device), random_ids(rows, length, device)
    work = f"{n_tokens} tokens, {rows} × {length} tokens in segments of {segment_length}; width {width}, {layers} layers"
    tokens = beside_authors(recurrent(clone, base, n_tokens, segment_length), ids)
    matrices = beside_authors(associative(clone, base, n_tokens, segment_length, key_dim), ids)
    return {
        "recurrent tokens": compared(tokens, rounds, device, work),
        "associative": compared(matrices, rounds, device, f"{work}, keys of {key_dim}"),
    }


def benchmark(rounds: int = 20, device: str = "cpu", armt: Path | None = None) -> dict:
    """All of it, as the JSON that is committed. `armt`: a clone of the authors' repository.

    Raises:
        ValueError: `armt` is another folder.
    """
    streams = {} if armt is None else compare_streams(armt, rounds, device)
    report = {
        "cartridge": compare_cartridges(rounds, device),
        "task tokens": compare_task_tokens(rounds, device),
        **streams,
        **where(device, "peft", "transformers"),
        "not installed": ["associative-recurrent-memory-transformer"] if armt is None else [],
    }
    for name, file in authors_rmt.FILES.items() if armt is not None else ():
        report["versions"][f"the authors' {name}"] = f"{file}, {version_of(armt / file)}"
    return report
