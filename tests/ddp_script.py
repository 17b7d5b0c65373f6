"""What `test_ddp.py` runs in two processes:

PYTHONPATH=.:tests ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 tests/ddp_script.py OUT

Writes one line of JSON a run to OUT: what was run, the error or None, and what became of the parameters.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
from matrix import KINDS, SEGMENT, TEXT, VOCAB, llama, tokens, wrap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, logging

import memlayers as ml

SHORT = SEGMENT - 2
LENGTHS = [(SHORT, TEXT), (TEXT, SHORT), (SHORT, SHORT), (2 * SEGMENT, SEGMENT + 1)]
"""Tokens of the texts in each step, by rank."""
SETTINGS = {
    "unused parameters are looked for": {"ddp_find_unused_parameters": True},
    "unused parameters are not looked for": {"ddp_find_unused_parameters": False},
    "checkpointing": {"gradient_checkpointing": True},
}


class Texts(torch.utils.data.Dataset):
    """One text a rank and step; rank 0's have the ids in them that the kind adds."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 2 * len(LENGTHS)

    def __getitem__(self, index):
        ids = tokens(1, LENGTHS[index // 2][index % 2], seed=index)[0]
        new = torch.arange(VOCAB, VOCAB + self.kind.n_new_tokens)[: len(ids) - 1]
        if index % 2 == 0:
            ids[1 : 1 + len(new)] = new
        return {"input_ids": ids, "labels": ids}


class InOrder(Trainer):
    """With a note of how long the texts were that this process has read."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, **kwargs):
        self.lengths = [*getattr(self, "lengths", []), inputs["input_ids"].shape[1]]
        return super().compute_loss(model, inputs, **kwargs)


def learned(model):
    return [p for _, p in ml.memory_parameters(model)]


def differs_by_rank(tensors):
    """Whether the two processes hold other values."""
    mine = torch.cat([x.detach().flatten() for x in tensors])
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return not torch.equal(*all_of_them)


def train(kind, options):
    """Steps of HF Trainer, each rank with texts of its own."""
    model = wrap(llama().base(), kind)
    before = [p.detach().clone() for p in learned(model)]
    base = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        given = TrainingArguments(
            folder,
            max_steps=len(LENGTHS),
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            **options,
        )
        trainer = InOrder(model=model, args=given, train_dataset=Texts(kind))
        trainer.train()
        assert type(trainer.model_wrapped) is DistributedDataParallel, type(trainer.model_wrapped)
        dist.barrier()
    return {
        "lengths": trainer.lengths,
        "steps": trainer.state.global_step,
        "ranks differ": differs_by_rank(model.parameters()),
        "moved": sum(not torch.equal(a, b) for a, b in zip(before, learned(model))),
        "of": len(before),
        "base moved": any(
            not torch.equal(a, b)
            for a, b in zip(base, [p for p in model.parameters() if not p.requires_grad])
        ),
    }


def loss_of(output):
    state = [x for part in output.memory_state.fields.values() for x in part.values()]
    return output.logits.pow(2).mean() + sum(
        x.pow(2).mean() for x in state if x.is_floating_point() and x.numel()
    )


def of_the_state(kind):
    """Plain DDP, with a loss of what was written: the gradients are the mean of both ranks'."""
    rank = dist.get_rank()
    model, alone = (wrap(llama().base(), kind).train() for _ in range(2))
    wrapped, far = DistributedDataParallel(model, find_unused_parameters=True), []
    for step, lengths in enumerate(LENGTHS):
        ids = tokens(2, lengths[rank], seed=2 * step + rank)
        model.zero_grad()
        output = wrapped(ids, close_memory=True)
        loss_of(output).backward()
        # what a rank makes of its own text; zeros where it makes nothing of a parameter
        found = torch.autograd.grad(
            loss_of(alone(ids, close_memory=True)), learned(alone), allow_unused=True, materialize_grads=True
        )
        for expected, parameter in zip(found, learned(model)):
            dist.all_reduce(expected := expected / dist.get_world_size())
            got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
            far.append(float((got - expected).abs().max() / (1e-6 + expected.abs().max())))
    return {
        "far": max(far),
        "gradient": any(p.grad is not None and bool(p.grad.any()) for p in learned(model)),
    }


def runs():
    for kind in KINDS:
        if kind.learns:
            for setting, options in SETTINGS.items():
                yield kind, setting, lambda kind=kind, options=options: train(kind, options)
            if kind.stateful:
                yield kind, "a loss of the state", lambda kind=kind: of_the_state(kind)


def main(out):
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    dist.init_process_group("gloo")
    for kind, setting, run in runs():
        line = {"kind": kind.name, "setting": setting, "rank": dist.get_rank(), "error": None}
        try:
            with contextlib.redirect_stdout(sys.stderr):
                line |= run()
        except Exception as error:
            traceback.print_exc()
            line["error"] = f"{type(error).__name__}: {error}"
        with open(f"{out}.{dist.get_rank()}", "a") as file:
            file.write(json.dumps(line) + "\n")
        if line["error"]:
            os._exit(1)  # the other process may wait for this one: torchrun ends it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
