"""The measurement of a bank beside one LoRA: that the arms are what they are called, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval import bank_report
from memlayers.eval.bank import MEMORY, Trial, evaluate, files_of, n_parameters, shuffled
from memlayers.eval.bank_config import BankEvalConfig
from memlayers.eval.bank_items import Documents
from memlayers.eval.output import read_report
from memlayers.eval.statistics import wilson
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "eval" / "lora_bank.yaml"
SMALL = {
    "n_documents": 3,
    "facts_per_document": 1,
    "n_deleted": 1,
    "memory": ml.LoRAMemoryConfig(r=8, lora_alpha=16.0),
    "bank": ml.LoRABankConfig(steps=60, learning_rate=0.01, batch_size=8, segment_length=24),
    "top_k": [1, 2],
    "temperatures": [0.01],
    "resamples": 100,
}


@pytest.fixture
def checkpoint(tiny_llama, tokenizer, tmp_path) -> str:
    """The tiny model and its tokenizer as a folder."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def small(checkpoint: str, **fields) -> BankEvalConfig:
    return BankEvalConfig(**{"model": checkpoint, "seeds": [3], **SMALL, **fields})


def test_documents(tokenizer):
    documents, again = (Documents(tokenizer, 4, 3, seed=1) for _ in range(2))
    other = Documents(tokenizer, 4, 3, seed=2)
    assert documents.texts == again.texts and not set(documents.texts.values()) & set(other.texts.values())
    assert len(documents.questions) == 4 * 3 * (4 + 2) and len(documents.strangers) == 4 * 3 * 2
    for item in documents.questions:
        said = f"{item.text} {item.fact.object}." in documents.texts[item.document]
        assert said == (item.prompts == "trained")
        assert item.question.ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(item.question.ids[1:]).strip() == item.text
    whole = " ".join(documents.texts.values())
    assert all(item.document not in documents.texts for item in documents.strangers)
    assert all(item.fact.subject not in whole for item in documents.strangers)


def test_nobody_gets_the_own_shard_of_the_shuffled():
    swapped = shuffled([f"d{i}" for i in range(7)])
    assert all(document not in groups for document, groups in swapped.items())
    assert sorted(group for (group,) in swapped.values()) == sorted(swapped)


def test_one_lora_has_the_parameters_of_all_shards_and_their_scaling(checkpoint):
    config = small(checkpoint)
    trial = Trial(config, seed=0)
    shard, one = (trial.askers[kind].model for kind in ("shard", "one"))
    assert n_parameters(one) == 3 * n_parameters(shard) > 0
    scalings = {a.scaling for model in (shard, one) for a in ml.memories(model)[MEMORY].adapters.values()}
    assert scalings == {2.0}


def test_every_arm(checkpoint, tmp_path):
    config = small(checkpoint)
    (report,) = evaluate(config, tmp_path / "out", progress=False)
    folder = tmp_path / "out" / "seed3"
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "report.json",
        "report.md",
        "samples.jsonl",
        "recall.png",
    }
    written = read_report(folder / "report.json")
    assert written.pop("samples_checksum")
    assert written == json.loads(json.dumps(report))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    n, n_kept = (
        3 * 6,
        2 * 6,
    )  # of a document and a stranger one fact each; a fact has four trained prompts and two that are held out
    counts = {arm: sum(row["arm"] == arm for row in rows) for arm in report["accuracy"]}
    routed = ["top-1", "top-2"]
    assert counts == {
        **dict.fromkeys(["base", *routed, "one LoRA"], n + 3 * 2),
        **dict.fromkeys(["own shard", "another's shard"], n),
        **dict.fromkeys([f"{arm}, after deletion" for arm in (*routed, "one LoRA")], n),
        "own shard, after deletion": n_kept,
    }
    for row in rows:
        assert row["correct"] == (row["prediction"] == row["answer"])
    accuracy = report["accuracy"]
    own, other = (accuracy[arm]["all"]["trained"]["accuracy"] for arm in ("own shard", "another's shard"))
    assert own > 0.3 > other  # 0.92, 0.83 and 0.58 with seeds 3 to 5
    assert accuracy["own shard, after deletion"]["kept"] == accuracy["own shard"]["kept"]
    deletion = report["deletion"]
    assert deletion["files_of_kept_shards_identical"] and deletion["answers_of_kept_shards_identical"]
    assert deletion["shards_left"] == 2 and len(deletion["documents"]) == 1
    assert report["routing"]["before"]["trained"]["top-3"]["accuracy"] == 1  # of three
    assert set(report["routing"]["temperatures"]["cells"]) == {"0.01"}
    assert report["parameters"]["one"] == 3 * report["parameters"]["shard"]
    assert {name: s["n"] for name, s in report["seconds"].items()} == {
        "add a shard": 3,
        "train one LoRA on 3 documents": 1,
        "forget a document: bank": 1,
        "train one LoRA on 2 documents": 1,
    }
    assert "own shard" in (tmp_path / "out" / "summary.md").read_text()
    assert (tmp_path / "out" / "recall.png").read_bytes()[:4] == b"\x89PNG"


def test_the_base_arm_is_the_base(checkpoint):
    trial = Trial(small(checkpoint), seed=1)
    trial._ask_base(trial.documents.questions[:8])
    asker = trial.askers["shard"]
    ml.detach(asker.model)
    for row, item in zip(trial.rows, trial.documents.questions):
        ids = torch.tensor([item.question.ids])
        longest = max(len(each.question.answer_ids) for each in trial.documents.questions[:8])
        out = asker.model.generate(ids, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        text = trial.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["prediction"] == text.partition(".")[0].strip()


def test_steps_and_texts_of_both_sides(checkpoint, tmp_path):
    trial = Trial(small(checkpoint, bank=ml.LoRABankConfig(steps=2), one_learning_rate=0.007), seed=1)
    bank, one = trial.bank(tmp_path / "bank"), trial.one_lora(tmp_path / "one", trial.documents.texts)
    shards, (alone,) = bank.list(), one.list()
    assert [list(shard.documents) for shard in shards] == [[name] for name in sorted(trial.documents.texts)]
    assert {**alone.documents} == {d: sha for shard in shards for d, sha in shard.documents.items()}
    assert alone.training.steps == sum(shard.training.steps for shard in shards) == 6
    assert (alone.training.learning_rate, alone.seed, shards[0].seed) == (0.007, 1, 1)
    before = files_of(bank.path)
    gone = trial.gone.copy().pop()
    bank.forget(gone)
    left = files_of(bank.path)
    assert left == {name: sha for name, sha in before.items() if f"/{gone}-" not in name} != before


def row(seed: int, arm: str, document: str, correct: bool, prompts: str = "trained") -> dict:
    return {
        "seed": seed,
        "arm": arm,
        "document": document,
        "part": "kept",
        "prompts": prompts,
        "correct": correct,
    }


def test_cells_count_documents_and_not_questions():
    rows = [row(s, "top-1", d, right) for s in (0, 1) for d in "ab" for right in (True, False, False, True)]
    found = bank_report.cell(rows, prompts="trained")
    low, high = wilson(2, 4)
    assert found == {"n": 16, "documents": 4, "accuracy": 0.5, "ci_low": low, "ci_high": high}


def test_gain_is_the_arm_less_the_one_lora():
    rows = [
        row(0, arm, d, arm == "top-1", p)
        for arm in ("top-1", "one LoRA")
        for p in ("trained", "held_out")
        for d in "ab"
    ]
    rows[0]["correct"] = False
    found = bank_report._gain(rows, "top-1", "trained", 200, 0)
    assert found["gain"] == 0.5 and found["ci_low"] == 0 and found["ci_high"] == 1
    assert bank_report._gain(rows, "top-1", "held_out", 200, 0)["ci_low"] == 1


def test_seeds_of_two_configs_make_no_summary(tmp_path):
    for seed, steps in enumerate((1, 2)):
        (tmp_path / f"seed{seed}").mkdir()
        report = {"config": {"seed": seed, "bank": {"steps": steps}}}
        (tmp_path / f"seed{seed}" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"seed1.*--out"):
        bank_report.write_summary(tmp_path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("n_deleted=40", "n_deleted: 40 of 40 documents leave none"),
        ("top_k=[1,1]", "top_k: .* names a value twice"),
        ("top_k=[1]", "temperatures: "),
        ("memory.rank=3", "memory.rank"),
        ("bank.temperature=0", "bank.temperature"),
        ("one_learning_rate=fast", "one_learning_rate"),
        ("model=null", "model"),
    ],
)
def test_bad_fields(override, said):
    with pytest.raises(ConfigError, match=said):
        load_yaml(YAML, [override], BankEvalConfig)


def test_the_committed_config():
    config = load_yaml(YAML, [], BankEvalConfig)
    assert (config.n_documents, config.n_deleted, len(config.seeds)) == (40, 10, 3)
    assert config.one.r == 40 * config.memory.r
