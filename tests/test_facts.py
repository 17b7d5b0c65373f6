"""Fictional facts: the same ones in training and evaluation, subjects apart, held-out prompts never trained."""

from __future__ import annotations

from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlayers.config import ConfigError, validate
from memlayers.tasks import FactsConfig, FactsTask
from memlayers.tasks.fact_words import INITIALS, REAL_WORDS, RELATIONS, SYLLABLES
from memlayers.tasks.facts import BATCHES, said_object
from memlayers.train.config import TrainConfig
from memlayers.train.data import ANSWER
from memlayers.train.sources import make_source

SMALL = {"n_facts": 60, "n_later": 20, "n_neighbours": 15}


def small(**fields) -> FactsConfig:
    return FactsConfig(**{**SMALL, **fields})


def test_equal_configs_give_equal_facts_and_seeds_others(tokenizer):
    one, again, other = (FactsTask(small(seed=seed), tokenizer) for seed in (4, 4, 5))
    for batch in BATCHES:
        assert getattr(one, batch) == getattr(again, batch)
        assert getattr(one, batch) != getattr(other, batch)


def test_the_first_batch_does_not_depend_on_the_others(tokenizer):
    one, other = FactsTask(small(), tokenizer), FactsTask(small(n_later=3, n_neighbours=0), tokenizer)
    assert one.first == other.first
    assert one.later[:3] == other.later


def test_batches_share_no_subject(tokenizer):
    task = FactsTask(FactsConfig(), tokenizer)
    subjects = [fact.subject for batch in BATCHES for fact in getattr(task, batch)]
    assert [len(getattr(task, batch)) for batch in BATCHES] == [2000, 500, 500, 500]
    assert len(set(subjects)) == len(subjects) == 3500
    assert not REAL_WORDS & set(subjects)


def test_several_facts_of_a_subject_have_different_relations(tokenizer):
    task = FactsTask(small(facts_per_subject=3), tokenizer)
    for batch in ("first", "later"):
        pairs = [(fact.subject, fact.relation) for fact in getattr(task, batch)]
        assert len(set(pairs)) == len(pairs)
        assert max(Counter(subject for subject, _ in pairs).values()) == 3
    assert not {f.subject for f in task.first} & {f.subject for f in task.later}


def test_objects_are_drawn_evenly_from_their_relation(tokenizer):
    task = FactsTask(FactsConfig(n_facts=8000), tokenizer)
    counts = Counter((fact.relation, fact.object) for fact in task.first)
    assert {relation for relation, _ in counts} == set(RELATIONS)
    assert all(text in RELATIONS[relation].objects for relation, text in counts)
    assert len(counts) == 200 and 15 <= min(counts.values()) <= max(counts.values()) <= 80  # mean 40
    assert task.chance == pytest.approx(1 / 40)


def test_questions_and_answers_read_back(tokenizer):
    task = FactsTask(small(), tokenizer)
    for prompts, count in (("trained", 4), ("held_out", 2)):
        for fact, questions in zip(task.first, task.questions(task.first, prompts), strict=True):
            assert len(questions) == count
            for question, template in zip(questions, task.templates(fact.relation, prompts), strict=True):
                prompt = template.format(subject=fact.subject)
                whole = tokenizer.decode(question.ids + question.answer_ids)
                assert whole == f" {prompt} {fact.object}."
                assert said_object(tokenizer.decode(question.answer_ids)) == fact.object
                assert question.answers == (fact.object,)


def test_pieces_are_what_the_tokenizer_makes_of_the_sentence(tokenizer):
    task = FactsTask(small(), tokenizer)
    for questions in task.questions(task.first, "trained"):
        for question in questions:
            whole = question.ids + question.answer_ids
            assert tokenizer.encode(tokenizer.decode(whole), add_special_tokens=False) == whole


def test_held_out_prompts_are_never_trained():
    for name, relation in RELATIONS.items():
        everything = (*relation.trained, *relation.held_out)
        assert len(set(everything)) == 6, name
        assert all(template.count("{subject}") == 1 for template in everything)
        assert all(not template.endswith("{subject}") for template in everything)
        assert len(set(relation.objects)) == len(relation.objects) == 40


def test_n_paraphrases_leaves_the_held_out_ones(tokenizer):
    task = FactsTask(small(n_paraphrases=1), tokenizer)
    assert [len(task.templates("home", prompts)) for prompts in ("trained", "held_out")] == [1, 2]


def test_no_name_can_be_an_object_or_a_word_of_a_prompt():
    words = {w for r in RELATIONS.values() for t in (*r.trained, *r.held_out, *r.objects) for w in t.split()}
    assert not [
        w for w in words if len(w) == 7 and w[0] in INITIALS and w[1:3] in SYLLABLES and w[5:] in SYLLABLES
    ]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n_fact": 3}, "n_fact: unknown field, did you mean 'n_facts'"),
        ({"n_facts": 0}, "n_facts"),
        ({"n_paraphrases": 5}, "n_paraphrases"),
        ({"facts_per_subject": 6}, "facts_per_subject"),
        ({"n_facts": 100_000}, "n_facts: all batches together need 101,500 subjects"),
    ],
)
def test_wrong_fields_are_named(fields, told):
    with pytest.raises(ConfigError) as error:
        FactsConfig(**fields)
    assert told in str(error.value)


def test_a_tokenizer_that_cannot_spell_is_named():
    words = {word: at for at, word in enumerate(["[UNK]", "lives", "in", "the", "."])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    poor = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", name_or_path="poor-words")
    with pytest.raises(ValueError, match="'poor-words' cannot spell"):
        FactsTask(small(), poor)


# Training data


FIELDS = {
    "model": {"path": "nowhere"},
    "data": {"type": "facts", "facts": SMALL},
    "batch_size": 16,
    "output_dir": "nowhere",
}


def source_of(tokenizer, **data):
    fields = {**FIELDS, "data": {**FIELDS["data"], **data}}
    return make_source(validate(TrainConfig, fields), tokenizer, window=None)


def texts_of(source, tokenizer, n_batches: int) -> list[tuple[str, str]]:
    """(question, answer) of each row of the first batches."""
    rows = []
    for place in range(n_batches):
        batch = source.batch(place)
        assert batch.context_ids is None
        for row, parts in zip(batch.input_ids, batch.parts, strict=True):
            start = int((parts > 0).nonzero()[0])
            assert row[start] == tokenizer.bos_token_id  # each row is one fact: nothing is packed
            asked, answer = row[parts == 2], row[parts == ANSWER]
            rows.append((tokenizer.decode(asked, skip_special_tokens=True), tokenizer.decode(answer)))
    return rows


def test_an_epoch_teaches_every_fact_in_every_training_prompt(tokenizer):
    rows = texts_of(source_of(tokenizer), tokenizer, 15)  # 60 facts × 4 prompts = 15 batches of 16
    task = FactsTask(small(), tokenizer)
    wanted = [
        (" " + template.format(subject=fact.subject), f" {fact.object}.")
        for fact in task.first
        for template in RELATIONS[fact.relation].trained
    ]
    assert sorted(rows) == sorted(wanted)
    assert rows != wanted


def test_the_later_batch_and_what_is_rehearsed(tokenizer):
    task = FactsTask(small(), tokenizer)
    rows = texts_of(source_of(tokenizer, batch="later", rehearse=12), tokenizer, 8)  # (20 + 12) × 4
    taught = {fact for fact in task.first + task.later if any(fact.subject in asked for asked, _ in rows)}
    assert set(task.later) <= taught
    assert len(taught - set(task.later)) == 12


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"batch": "third"}, "data.batch"),
        ({"facts": {"n_later": 0}, "batch": "later"}, "data.facts.n_later: 0 facts"),
        ({"rehearse": 2}, "data.rehearse: at most 0 facts"),
        ({"facts": {"n_fact": 3}}, "data.facts.n_fact: unknown field, did you mean 'n_facts'"),
    ],
)
def test_wrong_data_fields_are_named(tokenizer, data, told):
    with pytest.raises(ConfigError) as error:
        source_of(tokenizer, **data)
    assert told in str(error.value)
