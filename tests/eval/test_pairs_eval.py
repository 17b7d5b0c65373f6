"""The suite of associative recall: what each arm gets to see, teacher forcing in every regime, report and picture."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict

import pytest
import torch
from transformers import LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.config import ARMS, CONTROLS, EvalConfig, MqarSuiteConfig
from memlayers.eval.regimes import Asker
from memlayers.eval.run import evaluate, evaluate_model
from memlayers.eval.statistics import wilson
from memlayers.eval.summary import load_group, summary
from memlayers.eval.tokens import TokenAsker
from memlayers.tasks import MqarConfig, MqarTask, rng_for

WINDOW = 24
SUITE = {"type": "mqar", "task": {"type": "mqar", "vocab_size": 60}, "n_pairs": [4], "lengths": [40], "n": 6}
CELL = {"n", "rows", "accuracy", "ci_low", "ci_high"}


class Recaller(LlamaForCausalLM):
    """Says what followed the last token like this one in its input, else token 0: an oracle for what it gets to see."""

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


def cells_of(report: dict, suite: str = "mqar", length: int = 40, n_pairs: int = 4) -> dict:
    """regime -> arm or control -> cell."""
    block, out = report["mqar"][suite], defaultdict(dict)
    for part in ("results", "controls"):
        for regime, by_length in block[part].items():
            out[regime] |= by_length[str(length)][str(n_pairs)]
    return out


def samples_of(tokenizer, n: int, length: int = 40, **fields) -> list:
    task = MqarTask(MqarConfig(**{"n_pairs": 4, "vocab_size": 60, **fields}), tokenizer, "eval")
    return [task.sample(rng_for("eval", 1, index), length) for index in range(n)]


def test_each_arm_sees_what_it_should(recaller, tokenizer):
    report = evaluate_model(recaller, tokenizer, {"mqar": SUITE}, base=Recaller(recaller.config))
    cells = cells_of(report)
    for regime in "FWD":
        assert cells[regime]["base"]["accuracy"] == 1.0
        assert cells[regime]["question_only"]["accuracy"] == 0.0
        assert 0 < cells[regime]["base_cut"]["accuracy"] < 1
        assert cells[regime]["base_cut"] == cells[regime]["memory_off"]
    assert cells["W"]["trained"]["accuracy"] == 1.0
    assert cells["D"]["trained"]["accuracy"] == 0.0  # the question alone is its input
    assert cells["W"]["no_needle"]["accuracy"] == cells["D"]["no_needle"]["accuracy"] == 0.0
    assert "do not fit in attention" in cells["F"]["trained"]["not_run"]
    assert "no state" in cells["W"]["shuffled_memory"]["not_run"]
    gain = report["mqar"]["mqar"]["gain"]["W"]["40"]["4"]
    assert gain["rows"] == 6 and gain["gain"] == pytest.approx(1 - cells["W"]["base_cut"]["accuracy"])
    assert gain["ci_low"] <= gain["gain"] <= gain["ci_high"]


def test_the_cut_arms_see_the_last_tokens_before_each_query(recaller, tokenizer):
    """Right is a query whose key was written no more than the window before."""
    samples = samples_of(tokenizer, 8)
    said = TokenAsker(Asker(Recaller(recaller.config), tokenizer, batch_size=5)).in_one_call(
        samples, last=WINDOW
    )
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
    suite = {**SUITE, "task": {**SUITE["task"], "overwrite": 1.0, "passes": 2}, "lengths": [60]}
    cells = cells_of(evaluate_model(recaller, tokenizer, {"mqar": suite}), length=60)
    assert cells["W"]["trained"]["accuracy"] == 1.0


def test_intervals_count_rows_and_shares_count_queries(recaller, tokenizer):
    cell = cells_of(evaluate_model(recaller, tokenizer, {"mqar": SUITE}))["W"]["base_cut"]
    assert (cell["n"], cell["rows"]) == (24, 6)
    assert (cell["ci_low"], cell["ci_high"]) == pytest.approx(wilson(round(cell["accuracy"] * 6), 6))


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
    tokens = TokenAsker(Asker(wrapped, tokenizer, batch_size=3))
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
    tokens = TokenAsker(Asker(tiny_llama, tokenizer, batch_size=5))
    assert tokens.in_one_call(mixed) == [said for each in mixed for said in tokens.in_one_call([each])]


def test_shuffled_and_zeroed_states(wrapped, tokenizer):
    samples = samples_of(tokenizer, 4)
    twins = [type(s)(s.context, samples[0].questions, s.depths, s.group, s.length) for s in samples]
    tokens = TokenAsker(Asker(wrapped, tokenizer, batch_size=4))
    true, shuffled, zeroed = tokens.from_memory(twins, [None, "shuffled_memory", "zeroed_memory"])
    assert shuffled == true[1:] + true[:1]  # one question for all: row i says what row i + 1 would say
    assert len(set(map(tuple, zeroed))) == 1 and len(set(map(tuple, true))) > 1
    with pytest.raises(ValueError, match="two haystacks"):
        tokens.from_memory(samples[:1], ["shuffled_memory"])


def test_progress_counts_every_answer(wrapped, tokenizer, monkeypatch):
    from memlayers.eval.suites import mqar

    counted, promised = [], []
    monkeypatch.setattr(TokenAsker, "__init__", _counting(TokenAsker.__init__, counted))
    report = mqar.MqarSuite.report
    monkeypatch.setattr(
        mqar.MqarSuite, "report", lambda self: promised.append(self.n_answers) or report(self)
    )
    suite = {**SUITE, "n_pairs": [2, 4], "task": {**SUITE["task"], "n_queries": 3}}
    evaluate_model(wrapped, tokenizer, {"mqar": suite}, batch_size=4)
    assert sum(counted) == promised[0] > 0


def _counting(init, counted: list[int]):
    def wrapped_init(self, asker):
        asker.advance = counted.append
        init(self, asker)

    return wrapped_init


def test_shape_of_the_report_and_files(wrapped, tokenizer, tmp_path):
    tied = {
        **SUITE,
        "lengths": None,
        "n_pairs": [4, 2],
        "n": 3,
        "task": {**SUITE["task"], "tokens_per_pair": 8},
    }
    suites = {
        "grid": {**SUITE, "n_pairs": [8, 2], "lengths": [20, 40], "regimes": ["D", "W"], "n": 3},
        "tied": tied,
        "passkey": {"task": {"type": "passkey"}, "lengths": [32], "n": 1, "regimes": ["F"]},
    }
    out = tmp_path / "out"
    report = evaluate_model(wrapped, tokenizer, suites, output_dir=out)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "grid.png", "passkey.png", "report.json", "report.md", "samples.jsonl", "tied.png",
    ]  # fmt: skip
    assert (out / "tied.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text()) == report
    grid, tied = report["mqar"]["grid"], report["mqar"]["tied"]
    assert list(grid["results"]) == ["D", "W"] and list(grid["results"]["D"]) == ["20", "40"]
    assert list(tied["results"]["F"]) == ["17", "33"]  # with BOS
    for block in (grid, tied):
        for part, names in (("results", ARMS), ("controls", CONTROLS)):
            for by_length in block[part].values():
                for by_pairs in by_length.values():
                    for cells in by_pairs.values():
                        assert list(cells) == list(names)
                        assert all(set(cell) in (CELL, {"not_run"}) for cell in cells.values())
    short = grid["results"]["D"]["20"]["8"]["trained"]["not_run"]
    assert "length 20 is too short for 8 pairs" in short and "at least 33 tokens" in short

    text = (out / "report.md").read_text()
    assert "## grid, regime D" in text and "## tied, regime F" in text and "## passkey, regime F" in text
    assert "| 2 | 17 | 6 in 3 rows |" in text and "length 20 is too short" in text
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    mine = [
        r
        for r in rows
        if (r["suite"], r["regime"], r["arm"]) == ("tied", "D", "trained") and r["n_pairs"] == 4
    ]
    assert len(mine) == 3 and all(
        len(r["keys"]) == len(r["answers"]) == len(r["predictions"]) == 4 for r in mine
    )
    right = sum(a == b for r in mine for a, b in zip(r["answers"], r["predictions"]))
    assert right / 12 == tied["results"]["D"]["33"]["4"]["trained"]["accuracy"]

    lines = summary([load_group(f"ours@D={out}")], "tied").splitlines()
    assert "|  | regime | 2 pairs, 17 tokens | 4 pairs, 33 tokens |" in lines
    assert any(line.startswith("| ours: no_needle | D | ") for line in lines)


def test_same_seed_same_rows_and_other_cells_have_others(wrapped, tokenizer):
    suites = {"mqar": {**SUITE, "n_pairs": [3, 4], "n": 2, "regimes": ["D"]}}
    few = {"arms": ["trained"], "controls": []}
    first, again, other = (evaluate_model(wrapped, tokenizer, suites, seed=s, **few) for s in (0, 0, 1))
    assert first["samples"] == again["samples"] != other["samples"]
    keys = {tuple(row["keys"][:2]) for row in first["samples"] if row["arm"] == "trained"}
    assert len(keys) == 4


def test_a_plain_model_and_one_row(tiny_llama, tokenizer):
    cells = cells_of(evaluate_model(tiny_llama, tokenizer, {"mqar": {**SUITE, "n": 1}}))
    assert cells["F"]["trained"] == cells["F"]["base"]
    assert "no memory" in cells["F"]["memory_off"]["not_run"]
    assert "not_run" in cells["D"]["trained"]


def test_longer_than_the_positions_is_not_run(wrapped, tokenizer):
    cells = cells_of(
        evaluate_model(wrapped, tokenizer, {"mqar": {**SUITE, "lengths": [300], "n": 2}}), length=300
    )
    assert "300 tokens are longer than the model's 256 positions" in cells["D"]["base"]["not_run"]
    assert set(cells["D"]["trained"]) == CELL and set(cells["W"]["trained"]) == CELL


def test_a_checkpoint(wrapped, tiny_llama, tokenizer, tmp_path):
    tiny_llama.config._name_or_path = str(tmp_path / "base")
    ml.save(wrapped, tmp_path / "out")
    ml.detach(wrapped)
    wrapped.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = EvalConfig(model=str(tmp_path / "out"), suites={"mqar": MqarSuiteConfig(**{**SUITE, "n": 2})})
    report = evaluate(config, tmp_path / "eval", progress=False)
    assert all(set(cells_of(report)["D"][name]) == CELL for name in (*ARMS, *CONTROLS))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"task": {"type": "mqar", "n_pairs": 4}}, "suites.mqar.task.n_pairs: the suite's own n_pairs"),
        ({"task": {"type": "mqar", "tokens_per_pair": 4}}, "suites.mqar.lengths: give lengths or"),
        ({"task": {"type": "mqar", "passes": 0}}, "suites.mqar.task.passes"),
        ({"task": {"type": "mqar", "vocab_size": 500}}, "suites.mqar.task.vocab_size: ids below 500"),
        ({"n_pairs": [4, 4]}, "suites.mqar.n_pairs: [4, 4] names a value twice"),
        ({"n_pairs": [0]}, "suites.mqar.n_pairs.0"),
        ({"length": [40]}, "suites.mqar.length: unknown field, did you mean 'lengths'"),
        ({"regimes": ["P"]}, "suites.mqar.regimes.0"),
        ({"type": "mqra"}, "suites.mqar: type 'mqra' is not one of"),
        ({"type": "haystack", "task": {"type": "mqar"}}, "type 'mqar' is not one of 'passkey', 'needle'"),
    ],
)
def test_wrong_fields_are_named(tiny_llama, tokenizer, fields, told):
    with pytest.raises(ConfigError) as error:
        evaluate_model(tiny_llama, tokenizer, {"mqar": {**SUITE, **fields}})
    assert told in str(error.value)
