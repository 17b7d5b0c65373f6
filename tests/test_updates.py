"""Fact updates: histories of an exact length whose last statement about a fact is the answer, and only there."""

from __future__ import annotations

import itertools

import pytest
import torch

from memlayers.config import ConfigError
from memlayers.eval import scoring
from memlayers.eval.experiments.finetuned import FinetunedConfig, finetuned
from memlayers.eval.models import load_plain
from memlayers.eval.runner import evaluate
from memlayers.eval.texts import ProseConfig
from memlayers.tasks import UpdatesConfig, make_task, rng_for
from memlayers.tasks.updates import OBJECTS, SUBJECTS

LENGTH = 32


@pytest.fixture(scope="module")
def task(tokenizer):
    return make_task(UpdatesConfig(statement_length=LENGTH), tokenizer)


def statements_of(task, context: list[int]) -> list[tuple[str, str]]:
    """(prompt, object) at the end of each block, by text."""
    blocks = [task.speller.decode(context[at : at + LENGTH]) for at in range(0, len(context), LENGTH)]
    return [tuple(block[block.rindex("home ") :].rsplit(" ", 1)) for block in blocks]


def question_of(task, sample) -> str:
    text = task.speller.decode(sample.questions[0].ids)
    return text[text.rindex("home ") :]


@pytest.mark.parametrize("n_statements", [1, 4, 16])
def test_the_last_object_counts_and_each_statement_ends_its_block(task, n_statements):
    overwritten = 0
    for index in range(20):
        sample = task.sample(rng_for("train", 0, index), task.length_for(n_statements))
        (question,) = sample.questions
        assert len(sample.context) == n_statements * LENGTH
        assert len(question.ids) + len(question.answer_ids) == LENGTH
        told = statements_of(task, sample.context)
        said = [each for prompt, each in told if prompt == question_of(task, sample)]
        assert question.answers == (said[-1],)
        assert task.speller.decode(question.answer_ids) == f" {said[-1]}."
        overwritten += len(said) > 1
    assert (overwritten > 0) == (n_statements > 1)


def test_half_of_the_statements_update_and_each_gives_another_object(task):
    history = task.history(rng_for("train", 0, 0), 8)
    assert len({each.subject for each in history}) == 4
    by_fact = {
        subject: [e.object for e in history if e.subject == subject]
        for subject in {e.subject for e in history}
    }
    assert all(a != b for objects in by_fact.values() for a, b in itertools.pairwise(objects))
    assert len({e.subject for e in task.history(rng_for("train", 0, 0), 40)}) == len(task.subjects)


def test_filler_names_no_subject_and_no_object(task):
    assert task.filler.sentences
    for ids in task.filler.sentences:
        words = task.speller.decode(ids).strip(" .").lower().split()
        assert not {*words} & {*SUBJECTS, *OBJECTS}


def test_without_its_needle_the_fact_is_not_stated_and_the_rest_stays(task):
    for index in range(10):
        with_it, without = (
            task.sample(rng_for("eval", 0, index), task.length_for(8), needle=needle)
            for needle in (True, False)
        )
        prompt = question_of(task, with_it)
        assert question_of(task, without) == prompt and len(without.context) == len(with_it.context)
        text = task.speller.decode(without.context)
        assert prompt in task.speller.decode(with_it.context) and prompt not in text


def test_depth_chooses_the_fact_by_its_last_statement(task):
    for index in range(10):
        rng = rng_for("eval", 0, index)
        late = task.sample(rng, task.length_for(8), depth=1.0)
        assert late.depths == [1.0] and late.questions[0].answers[0] in task.speller.decode(
            late.context[-LENGTH:]
        )
        early = task.sample(rng, task.length_for(8), depth=0.0)
        assert early.depths[0] < 1.0


def test_train_and_eval_draw_other_histories(task):
    length = task.length_for(8)
    contexts = {
        split: {tuple(task.sample(rng_for(split, 0, index), length).context) for index in range(50)}
        for split in ("train", "eval")
    }
    assert not contexts["train"] & contexts["eval"]


def test_the_first_word_said_is_scored():
    assert scoring.exact(" mill. The cat", ("mill",), "object")
    assert not scoring.exact(" mills", ("mill",), "object")


def test_errors_name_what_to_change(tokenizer, task):
    with pytest.raises(ValueError, match="statement_length: 4 tokens are too few"):
        make_task(UpdatesConfig(statement_length=4), tokenizer)
    for length in (LENGTH, 3 * LENGTH + 1):
        with pytest.raises(ValueError, match="is no history"):
            task.sample(rng_for("train", 0, 0), length)
    with pytest.raises(ConfigError, match="n_subjects"):
        UpdatesConfig(n_subjects=99)


@pytest.fixture
def tuning(tiny_llama, tokenizer, tmp_path):
    """A config of finetuning on the tiny model, with little of everything."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("Rain falls on the old roof. A boat waits in the harbour. " * 60, encoding="utf-8")
    return FinetunedConfig(
        model=str(tmp_path / "base"),
        task=UpdatesConfig(statement_length=LENGTH),
        n_statements=[1],
        n=2,
        steps=20,
        learning_rate=1e-2,
        prose=ProseConfig(file=str(text), windows=2, n_sequences=2),
        seeds=[0],
    )


def test_finetuning_learns_a_statement_and_leaves_the_base(tuning, tokenizer):
    base = load_plain(tuning.model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    sample = make_task(tuning.task, tokenizer).sample(rng_for("eval", 0, 0), 2 * LENGTH)
    tuned = finetuned(base, sample, tuning)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    ids = torch.tensor([sample.context])
    said = tuned(input_ids=ids).logits[0, -2].argmax()
    assert said == ids[0, -1]


def test_finetuning_report_and_summary(tuning, tmp_path):
    results = evaluate(tuning, tmp_path / "out", progress=False)
    assert results.cell(arm="finetuned", n_statements=1)["n"] == 2
    texts = {r["text_after"] for r in results.records if "text_after" in r}
    assert texts == {"base", "finetuned on 1 statements"}
    assert "finetuned on 1 statements" in (tmp_path / "out" / "report.md").read_text()
