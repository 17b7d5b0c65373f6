"""Sparse memory finetuning: the ranking against its formula, and runs in which little else than new slots moves."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from memlayers.config import ConfigError
from memlayers.train.config import SparseFinetuningSection
from memlayers.train.run import train
from memlayers.train.sparse_finetuning import top_slots

MEMORY = {"type": "product_key", "n_keys": 8, "heads": 2, "top_k": 4, "key_dim": 8, "layers": [0, 1]}
VALUES = "memlayers.facts.values"


def text(path, words: str, n: int = 400):
    path.write_text(" ".join(words.split()[i * i % 7 % len(words.split())] for i in range(n)))
    return str(path)


@pytest.fixture
def run(fields, tmp_path):
    """A function: the fields of a run of plain text on a product-key memory, with changes."""

    def make(name: str, **changes) -> dict:
        news = text(tmp_path / "news.txt", "The secret number of the key is hidden")
        plain = {"memories": {"facts": MEMORY}, "train_what": "memory", "curriculum": None}
        plain["data"] = {"type": "text", "files": [news], "length": 16}
        plain["optimizer"] = {"learning_rate": 0.01, "values": {"learning_rate": 0.01}}
        return fields(**{**plain, "output_dir": str(tmp_path / name), **changes})

    return make


@pytest.fixture
def finetuning(run, tmp_path, base):
    """A function: the fields of a sparse finetuning of what the run above leaves."""

    def make(first, top_t: int, **changes) -> dict:
        old = text(tmp_path / "old.txt", "grass is green and the sky blue")
        section = {"top_t": top_t, "files": [old], "length": 16, "n_batches": 3}
        changes = {"memories": {}, "train_what": "values", "sparse_finetuning": section, **changes}
        changes["model"] = {"path": str(first), "tokenizer": str(base)}
        return run(f"second{top_t}", **changes)

    return make


def checked(fields):
    from memlayers.config import validate
    from memlayers.train.config import TrainConfig

    return validate(TrainConfig, fields)


def test_the_ranking_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    reads = torch.randint(0, 5, (40,), generator=generator)
    frequency = torch.randint(0, 11, (40,), generator=generator)
    section = SparseFinetuningSection(top_t=6, files=["x"], n_batches=10)
    scores = [
        r / reads.sum().item() * math.log(11 / (f + 1)) for r, f in zip(reads.tolist(), frequency.tolist())
    ]
    cut = sorted(scores)[-6]
    chosen = top_slots(reads, frequency, section)
    assert chosen.sum() == 6
    assert all(score >= cut - 1e-9 for score, taken in zip(scores, chosen.tolist()) if taken)


def test_slots_that_every_batch_reads_and_slots_that_are_not_read_are_never_chosen():
    section = SparseFinetuningSection(top_t=100, files=["x"], n_batches=4)
    chosen = top_slots(torch.tensor([9, 0, 3, 1]), torch.tensor([4, 0, 1, 3]), section)
    assert chosen.tolist() == [False, False, True, True]


def test_only_the_top_slots_of_a_step_move_and_nothing_else(run, finetuning, tmp_path):
    first = train(checked(run("first")))
    before = load_file(first / "memory.safetensors")
    for top_t in (3, 1000):
        second = train(checked(finetuning(first, top_t, max_steps=1)))
        after = load_file(second / "memory.safetensors")
        moved = (after[VALUES] != before[VALUES]).any(1).sum().item()
        assert moved == 3 if top_t == 3 else moved > 3
        assert all(torch.equal(after[name], before[name]) for name in before if name != VALUES)


def test_slots_of_the_background_stay(run, finetuning, base, tmp_path):
    """The very text that is learned as background: every slot it always reads has TF-IDF 0 and may not move."""
    first = train(checked(run("first")))
    fields = finetuning(first, 1000, max_steps=1)
    fields["sparse_finetuning"]["files"] = [str(tmp_path / "news.txt")]
    fields["sparse_finetuning"]["n_batches"] = 1
    fields["sparse_finetuning"]["batch_size"] = 4
    second = train(checked(fields))
    before, after = (load_file(folder / "memory.safetensors")[VALUES] for folder in (first, second))
    free = train(checked({**fields, "sparse_finetuning": None, "output_dir": str(tmp_path / "free")}))
    unhindered = load_file(free / "memory.safetensors")[VALUES]
    moved = [(t != before).any(1).sum().item() for t in (after, unhindered)]
    assert moved[0] < moved[1] / 2


def test_the_log_and_a_picture_tell_of_usage(run, tmp_path):
    out = train(checked(run("first", log_every=2))).parent
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        for layer in ("facts.layers.0", "facts.layers.1"):
            assert 0 < line[f"usage/{layer}/slots_used"] <= 1
            assert 1 <= line[f"usage/{layer}/effective_slots"] <= 64
    with Image.open(out / "usage.png") as picture:
        assert picture.size[0] > 500


def test_a_model_without_slots_logs_and_draws_nothing_of_them(config):
    out = train(config(max_steps=1)).parent
    assert "usage" not in (out / "log.jsonl").read_text() and not (out / "usage.png").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_what": "memory"}, "sparse_finetuning: works on value tables alone; set train_what: values"),
        ({"optimizer": {}}, "sparse_finetuning: works on value tables alone"),
        ({"sparse_finetuning": {"top_t": 0, "files": ["x"]}}, r"sparse_finetuning\.top_t"),
        ({"sparse_finetuning": {"files": ["x"], "topt": 5}}, r"sparse_finetuning\.topt: unknown field"),
    ],
)
def test_sections_that_do_not_fit(finetuning, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        checked(finetuning(tmp_path, 5, **changes))


def test_a_background_that_is_not_there(run, finetuning):
    first = train(checked(run("first", max_steps=1)))
    fields = finetuning(first, 5)
    fields["sparse_finetuning"]["files"] = ["nowhere.txt"]
    with pytest.raises(ConfigError, match=r"no file matches 'nowhere\.txt'"):
        train(checked(fields))


def test_values_alone_need_a_table(config):
    with pytest.raises(ConfigError, match="train_what: nothing would learn"):
        train(config(train_what="values"))


def test_values_alone_cannot_learn_behind_a_projection_at_zero(run):
    with pytest.raises(
        ConfigError, match=r"train_what: values alone .* value_proj of facts\.layers\.0 is still 0"
    ):
        train(checked(run("values", train_what="values")))
