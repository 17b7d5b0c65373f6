"""Task tokens in training: their tokenizer, the rows that do not learn, lengths after a step, text as background."""

import pytest
import torch
from matrix import says
from transformers import AutoTokenizer

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.train.background import divergence
from memlayers.train.data import Example, collate
from memlayers.train.model import build_model
from memlayers.train.optimizers import parameter_groups
from memlayers.train.run import train


@pytest.fixture
def with_tasks(config):
    """A function: a run of three steps with the procedures sort and copy, with changes of their fields."""

    def make(**fields):
        memory = {"type": "task_tokens", "names": ["sort", "copy"], **fields}
        data = {"type": "task", "task": {"type": "passkey", "digits": 3}, "regime": "F", "segment_length": 24}
        return config(
            memories={"tasks": memory}, train_what="memory", data={**data, "segments": 2}, max_steps=3
        )

    return make


def test_a_run_renormalizes_what_learns_and_saves_the_tokenizer(with_tasks, base):
    final = train(with_tasks(train=["copy"], renormalize=True))
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.convert_tokens_to_ids(["<|sort|>", "<|copy|>"]) == [400, 401]
    model = ml.load(final)
    memory, start = ml.memories(model)["tasks"], build_and_seed(with_tasks(train=["copy"]))
    for side, rows in memory.rows.sides().items():
        assert torch.equal(rows["0"], start.rows.sides()[side]["0"]), "a row that does not learn moved"
        torch.testing.assert_close(
            rows["1"].norm().item(), memory.base[side].norm, atol=0, rtol=1e-5
        )  # a float32 sum
    assert not torch.equal(memory.rows.output["1"], start.rows.output["1"])


def build_and_seed(config):
    torch.manual_seed(config.seed)
    return ml.memories(build_model(config)[0])["tasks"]


def test_only_rows_that_learn_are_optimized(with_tasks):
    config = with_tasks(train=["copy"])
    names = [
        n for g in parameter_groups(build_model(config)[0], config.optimizer) for n in g["parameter_names"]
    ]
    assert names == [f"memlayers.tasks.rows.{side}.1" for side in ("input", "output")]


def test_a_tokenizer_without_room_names_the_memory(with_tasks, base, tokenizer):
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["<|mine|>"])
    larger.save_pretrained(base)
    with pytest.raises(ConfigError, match=says("memories.tasks.names:", "no room for")):
        build_model(with_tasks())


def test_divergence_counts_what_procedures_take_from_text(with_tasks):
    """The base's distribution with a share taken away: KL(base ‖ model) is the log of what is left, negated."""
    model = build_model(with_tasks())[0].eval()
    batch = collate([Example((), (), torch.randint(3, 400, (n,)).tolist()) for n in (9, 6)], "W")
    with torch.no_grad():
        far = divergence(model, batch)
        ids, mask = batch.input_ids, batch.attention_mask
        left = model(ids, attention_mask=mask).logits.softmax(-1)[..., :400].sum(-1)
    real = batch.parts > 0
    expected = ((-left.log() * real).sum(1) / real.sum(1)).mean()
    assert expected > 0
    torch.testing.assert_close(far, expected, atol=1e-5, rtol=1e-4)
