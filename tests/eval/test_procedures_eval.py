"""Procedures learned in batches: that the arms are what they are called, on a tiny base; the tables, by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlayers.config import ConfigError
from memlayers.eval.experiments.procedures import ProceduresEvalConfig, ProceduresRun
from memlayers.eval.learners import LoraArm, LoraLearner, TaskTokensArm, TokenLearner, learner_uses, tensors
from memlayers.eval.models import load_plain
from memlayers.eval.runner import evaluate
from memlayers.tasks.procedures import ProceduresConfig, ProceduresTask
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "eval" / "procedures.yaml"
PROCEDURES = ProceduresConfig(
    n_compositions=8, n_compounds=5, n_names=9, n_known=6, n_orders=4, n_maps=4, n_name_words=5
)
ARMS = {
    "tokens": {"type": "task_tokens", "learning_rate": 0.05},
    "tokens, replay": {"type": "task_tokens", "learning_rate": 0.05, "replay": 2, "renormalize": True},
    "lora": {"type": "lora", "r": 1, "learning_rate": 0.01},
}


@pytest.fixture
def base(tmp_path) -> Path:
    """A random base with the files that train/procedures_base.py leaves."""
    task = ProceduresTask(PROCEDURES)
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": task.tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(task.tokenizer), tie_word_embeddings=True, **fields, **ends)
    folder = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    (folder / "procedures.json").write_text(json.dumps(PROCEDURES.model_dump()))
    return folder


def config(base: Path, **fields) -> ProceduresEvalConfig:
    small = {"batches": 2, "batch_procedures": 3, "steps": 3, "batch_size": 4, "queries": 2, "seeds": [7]}
    return ProceduresEvalConfig(**{"base": str(base), "arms": ARMS, "resamples": 100, **small, **fields})


def test_the_whole_path(base, tmp_path):
    out = tmp_path / "out"
    results = evaluate(config(base), out, progress=False)
    rows = [r for r in results.records if "query" in r]
    # base and prompt once; each arm after 3 and after 6 procedures; two arms of task tokens with three controls
    assert len(rows) == 2 * (2 * 6 + 3 * (3 + 6) + 2 * 3 * 6)
    found = {r["arm"]: r for r in results.records if "parameters" in r}
    for arm in ("tokens", "tokens, replay"):
        assert found[arm]["earlier_identical"] is True and found[arm]["parameters"] == 6 * 16
        off = [r["prediction"] for r in rows if r["arm"] == f"{arm}: memory off"]
        assert off == [r["prediction"] for r in rows if r["arm"] == "base"]
    assert found["lora"]["parameters"] == 4 * 32 + 3 * 32  # q, k, v, o; gate, up, down
    cell = results.cell(arm="lora", after=2, metric="drop of earlier ones")
    assert (cell["n"], cell["units"]) == (6, 3)


def test_a_drop_is_against_the_time_of_the_own_batch(base, tmp_path):
    rows = [r for r in evaluate(config(base), tmp_path / "out", progress=False).records if "query" in r]
    for row in (r for r in rows if "accuracy_drop" in r):
        same = [r for r in rows if all(r[key] == row[key] for key in ("arm", "unit", "item"))]
        (then,) = (r for r in same if r["after"] == r["batch"])
        assert row["batch"] < row["after"]
        assert row["accuracy_drop"] == then["correct"] - row["correct"]


def test_both_learn_from_the_same_uses(base):
    trial = ProceduresRun(config(base), 7, iter)
    batch, seen = trial.batches[0], []
    for kind, settings in ((TokenLearner, TaskTokensArm()), (LoraLearner, LoraArm(says="words"))):
        learner = kind(settings, load_plain(str(base)), trial.task)
        learner.begin(batch)
        rng = random.Random(3)
        draws = learner_uses(learner, batch, rng, 4)
        seen.append([next(draws) for _ in range(3)])
    tokens, lora = ([t for step in steps for t in step] for steps in seen)
    assert [p for p, _ in tokens] == [p for p, _ in lora]
    assert [rest[1:] for _, rest in tokens] == [rest[2:] for _, rest in lora]
    first = len(trial.task.tokenizer)
    assert {rest[0] for _, rest in tokens} == {first, first + 1, first + 2}
    # Every procedure once before any comes again.
    names = [rest[0] for _, rest in tokens]
    assert len(set(names[:3])) == len(set(names[3:6])) == 3


def test_labels_are_what_follows_the_prompt():
    found = tensors([([5, 6], [7]), ([5], [8, 9, 10])])
    assert found["input_ids"].tolist() == [[5, 6, 7, 0], [5, 8, 9, 10]]
    assert found["labels"].tolist() == [[-100, -100, 7, -100], [-100, 8, 9, 10]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batches": 3}, "batches: 9 procedures are asked for, 8 compositions"),
        ({"seeds": [1, 1]}, "seeds: .* names a value twice"),
        ({"arms": {}}, "arms"),
        ({"arms": {"prompt": ARMS["lora"]}}, "arms.prompt: this name belongs"),
    ],
)
def test_bad_fields(base, fields, said):
    with pytest.raises(ValueError, match=said):
        ProceduresRun(config(base, **fields), 0, iter)


def test_a_base_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make it: python train/procedures_base\.py"):
        evaluate(config(tmp_path / "gone"), tmp_path / "out")


def test_the_committed_config():
    committed = load_yaml(YAML, [], ProceduresEvalConfig)
    assert (committed.batches, committed.batch_procedures, len(committed.seeds)) == (4, 16, 3)
    with pytest.raises(ConfigError, match=r"arms.*lerning_rate"):
        load_yaml(YAML, ["arms.LoRA.lerning_rate=1"], ProceduresEvalConfig)
