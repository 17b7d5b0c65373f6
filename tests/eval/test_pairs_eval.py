"""Associative recall: what each arm gets to see, teacher forcing under every condition, report and picture."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from transformers import LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval import runner
from memlayers.eval.experiments.pairs import PairsConfig
from memlayers.eval.models import ARMS, CONTROLS
from memlayers.eval.probes import TokenProber
from memlayers.eval.statistics import wilson
from memlayers.tasks import MqarConfig, MqarTask, rng_for

WINDOW = 24
FIELDS = {"task": {"type": "mqar", "vocab_size": 60}, "n_pairs": [4], "lengths": [40], "n": 6}
FULL, STREAM, MEMORY = "full_context", "sliding_window", "memory_only"


def evaluate_model(model, tokenizer, **fields) -> runner.Results:
    return runner.evaluate_model(model, tokenizer, "pairs", **{**FIELDS, **fields})


class Recaller(LlamaForCausalLM):
    """Predicts what followed the last token like this one in its input, else token 0: an oracle for what it gets to see."""

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        kwargs.pop("use_cache", None)
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
        )
        logits = torch.zeros_like(output.logits)
        for row, ids in enumerate(input_ids.tolist()):
            followed = {}
            for at, token in enumerate(ids):
                logits[row, at, followed.get(token, 0)] = 1.0
                if at + 1 < len(ids):
                    followed[token] = ids[at + 1]
        output.logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return output


@pytest.fixture
def recaller(tiny_llama, monkeypatch):
    """With memory in segments of `WINDOW` tokens; `Recaller` looks at the whole call whatever the segments are, so that
    `attach` would refuse it: nothing that memory holds reaches its logits."""
    monkeypatch.setattr(importlib.import_module("memlayers.attach"), "probe", lambda model, name: None)
    model = Recaller(tiny_llama.config)
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=WINDOW), name="stream")
    return model


def cells_of(results: runner.Results, length: int = 40, n_pairs: int = 4) -> dict[str, dict]:
    """condition -> arm or control -> cell."""
    found = {}
    for table in results.report["tables"]:
        for cell in table["cells"]:
            if (cell.get("length"), cell.get("n_pairs")) == (length, n_pairs) and "over" not in cell:
                found.setdefault(cell["condition"], {}).setdefault(cell.get("arm"), cell)
    return found


def samples_of(tokenizer, n: int, length: int = 40, **fields) -> list:
    task = MqarTask(MqarConfig(**{"n_pairs": 4, "vocab_size": 60, **fields}), tokenizer, "eval")
    return [task.sample(rng_for("eval", 1, index), length) for index in range(n)]


def test_each_arm_sees_what_it_should(recaller, tokenizer):
    results = evaluate_model(recaller, tokenizer, base=Recaller(recaller.config))
    cells = cells_of(results)
    for condition in (FULL, STREAM, MEMORY):
        assert cells[condition]["base"]["value"] == 1.0
        assert cells[condition]["question_only"]["value"] == 0.0
        assert 0 < cells[condition]["base_truncated"]["value"] < 1
        assert cells[condition]["base_truncated"]["value"] == cells[condition]["memory_disabled"]["value"]
    assert cells[STREAM]["trained"]["value"] == 1.0
    assert cells[MEMORY]["trained"]["value"] == 0.0  # the question alone is its input
    assert cells[STREAM]["no_needle"]["value"] == cells[MEMORY]["no_needle"]["value"] == 0.0
    assert "do not fit in attention" in cells[FULL]["trained"]["not_run"]
    assert "no state" in cells[STREAM]["shuffled_memory"]["not_run"]
    gain = results.cell(condition=STREAM, length=40, arm="trained", over="base_truncated")
    assert gain["n"] == 6 and gain["value"] == pytest.approx(1 - cells[STREAM]["base_truncated"]["value"])
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_the_truncated_arms_see_the_last_tokens_before_each_query(recaller, tokenizer):
    """Right is a query whose key was written no more than the window before."""
    samples = samples_of(tokenizer, 8)
    said = TokenProber(Recaller(recaller.config), tokenizer, batch_size=5).in_one_call(samples, last=WINDOW)
    n_right = 0
    for sample, tokens in zip(samples, said, strict=True):
        (question,) = sample.questions
        for at, token in zip(question.answer_at, tokens, strict=True):
            key_before = sample.context.index(question.ids[at - 1])
            reached = len(sample.context) + at - key_before <= WINDOW
            assert (token == question.ids[at]) == reached
            n_right += reached
    assert 0 < n_right < 32


def test_the_last_value_of_a_key_counts(recaller, tokenizer):
    task = {**FIELDS["task"], "overwrite": 1.0, "passes": 2}
    cells = cells_of(evaluate_model(recaller, tokenizer, task=task, lengths=[60]), length=60)
    assert cells[STREAM]["trained"]["value"] == 1.0


def test_intervals_count_rows_and_shares_count_queries(recaller, tokenizer):
    cell = cells_of(evaluate_model(recaller, tokenizer))[STREAM]["base_truncated"]
    assert (cell["n"], cell["units"]) == (24, 6)
    assert (cell["low"], cell["high"]) == pytest.approx(wilson(round(cell["value"] * 6), 6))


@pytest.fixture
def wrapped(tiny_llama):
    """A random model whose answers depend on its memory."""
    memory = ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=4, segment_length=WINDOW), name="stream")
    torch.manual_seed(1)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    for parameter in tiny_llama.get_decoder().parameters():
        parameter.data.mul_(4)
    return tiny_llama


@torch.no_grad()
def one_by_one(model, ids: list[int], at: int, state=None) -> int:
    """What follows the first `at` of `ids`, by the plainest way: one row, no padding, nothing behind it."""
    given = {} if state is None else {"memory_state": state}
    return int(model(input_ids=torch.tensor([ids[:at]]), use_cache=False, **given).logits[0, -1].argmax())


def test_one_call_for_all_queries_equals_asking_each_alone(wrapped, tokenizer):
    samples = samples_of(tokenizer, 5)
    tokens = TokenProber(wrapped, tokenizer, batch_size=3)
    (remembered,), streamed = tokens.from_memory(samples), tokens.in_one_call(samples)
    alone = tokens.question_only(samples)
    for row, sample in enumerate(samples):
        (question,) = sample.questions
        state, whole = ml.write(wrapped, torch.tensor([sample.context])), sample.context + question.ids
        for number, at in enumerate(question.answer_at):
            assert remembered[row][number] == one_by_one(wrapped, question.ids, at, state)
            assert streamed[row][number] == one_by_one(wrapped, whole, len(sample.context) + at)
            assert alone[row][number] == one_by_one(wrapped, question.ids, at)
    assert remembered != alone


def test_rows_of_several_lengths_are_padded_on_the_left(tiny_llama, tokenizer):
    mixed = (
        samples_of(tokenizer, 2) + samples_of(tokenizer, 2, length=33) + samples_of(tokenizer, 1, n_pairs=3)
    )
    tokens = TokenProber(tiny_llama, tokenizer, batch_size=5)
    assert tokens.in_one_call(mixed) == [said for each in mixed for said in tokens.in_one_call([each])]


def test_shuffled_and_zeroed_states(wrapped, tokenizer):
    samples = samples_of(tokenizer, 4)
    twins = [type(s)(s.context, samples[0].questions, s.depths, s.group, s.length) for s in samples]
    tokens = TokenProber(wrapped, tokenizer, batch_size=4)
    true, shuffled, zeroed = tokens.from_memory(twins, [None, "shuffled_memory", "zeroed_memory"])
    assert shuffled == true[1:] + true[:1]  # one question for all: row i says what row i + 1 would say
    assert len(set(map(tuple, zeroed))) == 1 and len(set(map(tuple, true))) > 1
    with pytest.raises(ValueError, match="two haystacks"):
        tokens.from_memory(samples[:1], ["shuffled_memory"])


def test_the_report(wrapped, tokenizer, tmp_path):
    fields = {"n_pairs": [8, 2], "lengths": [20, 40], "conditions": [MEMORY, STREAM], "n": 3}
    results = evaluate_model(wrapped, tokenizer, output_dir=tmp_path / "out", **fields)
    assert (tmp_path / "out" / "pairs.png").read_bytes().startswith(b"\x89PNG")
    short = cells_of(results, 20, 8)[MEMORY]["trained"]["not_run"]
    assert "length 20 is too short for 8 pairs" in short and "at least 33 tokens" in short
    for condition in (MEMORY, STREAM):
        assert {*ARMS, *CONTROLS} <= {*cells_of(results, 40, 2)[condition]}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## memory_only" in text and "length 20 is too short" in text and "6 in 3 rows" in text
    mine = [r for r in results.records if (r["condition"], r["arm"], r["n_pairs"]) == (MEMORY, "trained", 2)]
    mine = [r for r in mine if r["length"] == 40]
    assert len(mine) == 3 and all(
        len(r["keys"]) == len(r["answers"]) == len(r["predictions"]) == 2 for r in mine
    )
    right = sum(a == b for r in mine for a, b in zip(r["answers"], r["predictions"]))
    assert right / 6 == cells_of(results, 40, 2)[MEMORY]["trained"]["value"]
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == results.records


def test_lengths_that_follow_from_the_pairs(wrapped, tokenizer):
    task = {**FIELDS["task"], "tokens_per_pair": 8}
    results = evaluate_model(
        wrapped, tokenizer, task=task, lengths=None, n_pairs=[4, 2], n=2, arms=["base"], controls=[]
    )
    assert {(r["n_pairs"], r["length"]) for r in results.records} == {(2, 17), (4, 33)}  # with BOS


def test_same_seed_same_rows_and_other_cells_have_others(wrapped, tokenizer):
    few = {"arms": ["trained"], "controls": [], "n_pairs": [3, 4], "n": 2, "conditions": [MEMORY]}
    first, again, other = (evaluate_model(wrapped, tokenizer, seeds=[s], **few).records for s in (0, 0, 1))
    assert first == again != other
    assert len({tuple(row["keys"][:2]) for row in first}) == 4


def test_a_plain_model_and_one_row(tiny_llama, tokenizer):
    cells = cells_of(evaluate_model(tiny_llama, tokenizer, n=1))
    assert cells[FULL]["trained"]["value"] == cells[FULL]["base"]["value"]
    assert "no memory" in cells[FULL]["memory_disabled"]["not_run"]
    assert "not_run" in cells[MEMORY]["trained"]


def test_longer_than_the_positions_is_not_run(wrapped, tokenizer):
    cells = cells_of(evaluate_model(wrapped, tokenizer, lengths=[300], n=2), length=300)
    assert "300 tokens are longer than the model's 256 positions" in cells[MEMORY]["base"]["not_run"]
    assert "value" in cells[MEMORY]["trained"] and "value" in cells[STREAM]["trained"]


def test_a_checkpoint(wrapped, tiny_llama, tokenizer, tmp_path):
    tiny_llama.config._name_or_path = str(tmp_path / "base")
    ml.save(wrapped, tmp_path / "out")
    ml.detach(wrapped)
    wrapped.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = PairsConfig(model=str(tmp_path / "out"), **{**FIELDS, "n": 2})
    cells = cells_of(runner.evaluate(config, tmp_path / "eval", progress=False))
    assert all("value" in cells[MEMORY][name] for name in (*ARMS, *CONTROLS))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"task": {"type": "mqar", "n_pairs": 4}}, "task.n_pairs: the experiment's own n_pairs"),
        ({"task": {"type": "mqar", "tokens_per_pair": 4}}, "lengths: give lengths or"),
        ({"task": {"type": "mqar", "passes": 0}}, "task.passes"),
        ({"task": {"type": "mqar", "vocab_size": 500}}, "task.vocab_size: ids below 500"),
        ({"n_pairs": [4, 4]}, "n_pairs: [4, 4] names a value twice"),
        ({"n_pairs": [0]}, "n_pairs.0"),
        ({"length": [40]}, "length: unknown field, did you mean 'lengths'"),
        ({"conditions": ["closed_book"]}, "conditions.0"),
    ],
)
def test_wrong_fields_are_named(tiny_llama, tokenizer, fields, told):
    with pytest.raises(ConfigError) as error:
        evaluate_model(tiny_llama, tokenizer, **fields)
    assert told in str(error.value)
