"""Background text: the divergence against a sum by hand, and runs that keep the base's words."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlayers as ml
from memlayers.config import ConfigError, validate
from memlayers.tasks import FactsTask
from memlayers.train.background import Background, divergence
from memlayers.train.config import TrainConfig
from memlayers.train.data import Example, collate
from memlayers.train.log import read_log
from memlayers.train.run import train

MEMORY = {"type": "product_key", "layers": [0, 1], "n_keys": 8, "heads": 2, "top_k": 4, "key_dim": 8}
FACTS = {"n_facts": 8, "n_later": 4, "n_neighbours": 5}


@pytest.fixture
def run(fields, tmp_path):
    """A function: the fields of a run that teaches facts, with background or without, and with changes."""
    old = tmp_path / "old.txt"
    old.write_text("The sky is blue and the grass is green. " * 60)

    def make(background: dict | None = None, **changes) -> dict:
        plain = {
            "memories": {"facts": MEMORY},
            "train_what": "memory",
            "data": {"type": "facts", "facts": FACTS},
            "loss": {"rest": 0.0},
            "batch_size": 8,
        }
        if background is not None:
            background = {"files": [str(old)], "length": 16, "batch_size": 4, **background}
        return fields(**{**plain, "background": background, **changes})

    return make


@pytest.fixture
def wrapped(tiny_llama):
    """A model whose memory says something, in train mode, with dropout on its base."""
    ml.attach(tiny_llama, ml.ProductKeyMemoryConfig(**MEMORY), "facts")
    with torch.no_grad():
        for _, parameter in ml.memory_parameters(tiny_llama):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return tiny_llama.train()


def rows(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [Example((), (), torch.randint(3, 400, (n,), generator=generator).tolist()) for n in lengths]


def test_divergence_equals_its_definition(wrapped):
    examples = rows(9, 5, 7)
    found = divergence(wrapped, collate(examples, "W"))
    by_hand = []
    for example in examples:  # one row at a time: no padding
        ids = torch.tensor([example.answer])
        q = wrapped(ids).logits[0].double().softmax(-1)
        with ml.disabled(wrapped):
            p = wrapped(ids).logits[0].double().softmax(-1)
        by_hand.append((p * (p.log() - q.log())).sum(-1).mean().item())
    assert found.item() == pytest.approx(sum(by_hand) / 3, rel=1e-4)
    assert found.item() > 0.01


def test_divergence_teaches_the_memory_alone_and_leaves_the_mode(wrapped):
    wrapped.config.attention_dropout = 0.5
    for layer in wrapped.model.layers:
        layer.self_attn.attention_dropout = 0.5
    divergence(wrapped, collate(rows(9, 9), "W")).backward()
    assert wrapped.training and all(memory.enabled for memory in ml.memories(wrapped).values())
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    assert gradients and all(name.startswith("memlayers.") for name in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_divergence_is_nothing_at_attach(tiny_llama):
    ml.attach(tiny_llama, ml.ProductKeyMemoryConfig(**MEMORY), "facts")
    assert divergence(tiny_llama, collate(rows(6, 4), "W")).item() == pytest.approx(0.0, abs=1e-6)


def test_the_weight_counts(run, base, tmp_path):
    """At the second step the memory has moved alike: the loss is the answers' plus weight times the divergence."""
    path = base / "config.json"  # without dropout, so that the background takes no random numbers
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))
    losses = {}
    for name, background in (("none", None), ("one", {"weight": 1.0}), ("three", {"weight": 3.0})):
        made = run(background, max_steps=2, output_dir=str(tmp_path / name))
        train(validate(TrainConfig, made))
        losses[name] = [line["loss"] for line in read_log(tmp_path / name / "log.jsonl")]
    first, second = zip(*losses.values())
    assert first == pytest.approx([first[0]] * 3, abs=1e-5)
    divergence_then = second[1] - second[0]
    assert divergence_then > 1e-4
    assert second[2] - second[0] == pytest.approx(
        3 * divergence_then, rel=0.02
    )  # differences of float32 losses


def test_background_keeps_what_the_base_says(run, tmp_path, tokenizer):
    ids = tokenizer(["The sky is blue and the grass is green."], return_tensors="pt").input_ids[:, 1:]
    batch = collate([Example((), (), ids[0].tolist())], "W")
    moved = {}
    for name, background in (("free", None), ("held", {"weight": 10.0})):
        made = run(background, max_steps=30, log_every=30, output_dir=str(tmp_path / name))
        moved[name] = divergence(ml.load(train(validate(TrainConfig, made))).eval(), batch).item()
    assert moved["held"] < 0.5 * moved["free"]


@pytest.mark.parametrize(
    "learning",
    [
        {"train_what": "memory_and_base"},
        {"train_what": "memory_and_lora", "lora": {"r": 4}},
    ],
    ids=["base", "lora"],
)
def test_a_base_that_learns_is_held_to_what_it_was(run, base, tmp_path, tokenizer, learning):
    ids = tokenizer(["The sky is blue and the grass is green."], return_tensors="pt").input_ids[:, 1:]
    batch, original = collate([Example((), (), ids[0].tolist())], "W"), {}
    was, moved = AutoModelForCausalLM.from_pretrained(base).eval(), {}
    for name, background in (("free", None), ("held", {"weight": 10.0})):
        made = run(
            background, max_steps=30, log_every=30, output_dir=str(tmp_path / name), memories={}, **learning
        )
        trained = AutoModelForCausalLM.from_pretrained(train(validate(TrainConfig, made))).eval()
        moved[name] = divergence(trained, batch, was).item()
        original[name] = divergence(was, batch, was).item()
    assert moved["held"] < 0.8 * moved["free"] and max(original.values()) < 1e-6


def test_resumed_runs_read_the_same_background(run, tmp_path):
    straight = run({"neighbours": 2}, output_dir=str(tmp_path / "straight"), max_steps=4)
    train(validate(TrainConfig, straight))
    halves = run({"neighbours": 2}, output_dir=str(tmp_path / "halves"), max_steps=2)
    train(validate(TrainConfig, halves))
    train(validate(TrainConfig, {**halves, "max_steps": 4}), resume=True)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("straight", "halves")]
    assert logs[0] == logs[1]


def test_neighbours_are_the_spare_subjects_and_the_base_s_own_words(run, base, tokenizer):
    config = validate(TrainConfig, run({"neighbours": 6}))
    model = AutoModelForCausalLM.from_pretrained(base)
    ml.attach(model, ml.ProductKeyMemoryConfig(**MEMORY), "facts")
    with torch.no_grad():
        for _, parameter in ml.memory_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    background = Background(model.train(), config, tokenizer)
    assert model.training
    task = FactsTask(config.data.facts, tokenizer)
    prompts = {tuple([*task.bos, *q.ids]) for asked in task.questions(task.spare, "trained") for q in asked}
    others = background.others.examples
    assert len(others) == len(prompts) == 5 * 4
    plain = AutoModelForCausalLM.from_pretrained(base)
    for example in others[::5]:
        prompt = next(p for p in prompts if tuple(example.answer[: len(p)]) == p)
        said = plain.generate(
            torch.tensor([prompt]), max_new_tokens=len(example.answer) - len(prompt), do_sample=False
        )
        assert said[0].tolist() == list(example.answer)[: said.shape[1]]
    batch = background.batch(0)
    assert batch.input_ids.shape[0] == 4 + 6
    named = " ".join(tokenizer.decode(ids) for ids in batch.input_ids)
    for fact in task.first + task.later + task.neighbours:
        assert fact.subject not in named
    assert sum(fact.subject in named for fact in task.spare) >= 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memories": {}}, "train_what: nothing would learn"),
        ({"background": {"files": ["nowhere.txt"]}}, "background.files.0: no file matches 'nowhere.txt'"),
        (
            {"background": {"files": ["a"], "lenght": 3}},
            "background.lenght: unknown field, did you mean 'length'",
        ),
        (
            {"data": {"type": "facts", "facts": {**FACTS, "n_neighbours": 0}}},
            "background.neighbours: only data",
        ),
    ],
)
def test_what_does_not_fit_together(run, changes, told):
    with pytest.raises(ConfigError) as error:
        train(validate(TrainConfig, {**run({"neighbours": 1}), **changes}))
    assert told in str(error.value)


def test_facts_are_learned_by_full_finetuning(run, tmp_path):
    """The baseline of the facts: no memory, all parameters learn; accuracy counts whole answers."""
    made = run(
        memories={},
        train_what="memory_and_base",
        max_steps=120,
        log_every=40,
        optimizer={"learning_rate": 0.01},
    )
    train(validate(TrainConfig, made))
    lines = read_log(Path(made["output_dir"]) / "log.jsonl")
    assert lines[0]["accuracy"] < 0.5 < lines[-1]["accuracy"]
    assert lines[-1]["loss"] < 1.0 < lines[0]["loss"] < 2 * math.log(400)
