"""Generated tasks: exact lengths, needles once and in place, nothing shared between training and evaluation."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlayers.config import ConfigError
from memlayers.tasks import NeedleConfig, PasskeyConfig, make_task, rng_for
from memlayers.tasks.filler import split_sentences
from memlayers.tasks.haystack import hide
from memlayers.tasks.kinds import SPANS, first_spans, split_of
from memlayers.tasks.words import ADJECTIVES, NOISE_SENTENCES, NOUNS

CONFIGS = {
    "number": PasskeyConfig(),
    "word": PasskeyConfig(key_type="word"),
    "uuid": PasskeyConfig(key_type="uuid"),
    "multikey": NeedleConfig(n_keys=4, n_questions=2),
    "multivalue": NeedleConfig(n_values=3),
    "multiquery": NeedleConfig(n_keys=3, n_queries=2),
    "needles": NeedleConfig(filler="needles", key_type="uuid", value_type="uuid"),
}


def text_of(tokenizer, sample) -> str:
    return tokenizer.decode(sample.context, skip_special_tokens=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [400, 401, 517])
def test_length_is_exact_and_counts_question_and_answer(tokenizer, name, length):
    task = make_task(CONFIGS[name], tokenizer)
    for index in range(5):
        sample = task.sample(rng_for("train", 0, index), length)
        assert len(sample.context) + max(len(q.ids) + len(q.answer_ids) for q in sample.questions) == length
        assert sample.length == length
        assert sample.context[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in sample.questions[0].ids


@pytest.mark.parametrize("name", CONFIGS)
def test_each_answer_stands_once_with_needle_and_never_without(tokenizer, name):
    task = make_task(CONFIGS[name], tokenizer)
    for index in range(10):
        sample = task.sample(rng_for("train", 3, index), 420)
        empty = task.sample(rng_for("train", 3, index), 420, needle=False)
        assert len(empty.context) == len(sample.context)
        assert empty.questions == sample.questions
        for question in sample.questions:
            for answer in question.answers:
                assert text_of(tokenizer, sample).count(answer) == 1
                assert answer not in text_of(tokenizer, empty)


@pytest.mark.parametrize("name", CONFIGS)
def test_questions_and_answers_read_back(tokenizer, name):
    sample = make_task(CONFIGS[name], tokenizer).sample(rng_for("train", 0, 0), 420)
    for question in sample.questions:
        whole = tokenizer.decode(question.ids + question.answer_ids)
        assert first_spans(tokenizer.decode(question.answer_ids), question.kind, 9) == list(question.answers)
        assert whole == tokenizer.decode(question.ids) + " " + ", ".join(question.answers) + "."


def test_sentences_concatenate_as_if_tokenized_together(tokenizer):
    """Filler and needles, tokenized one by one, are what the tokenizer makes of the whole text."""
    task = make_task(PasskeyConfig(), tokenizer)
    sample = task.sample(rng_for("train", 0, 1), 300, depth=0.5)
    ids = sample.context[len(task.speller.bos) :]
    start = next(at for at in range(len(ids)) if tokenizer.decode(ids[at:]).startswith(tuple(NOISE_TEXTS)))
    tail = ids[start:] + sample.questions[0].ids + sample.questions[0].answer_ids
    assert tokenizer.encode(tokenizer.decode(tail), add_special_tokens=False) == tail


NOISE_TEXTS = [" " + sentence for sentence in NOISE_SENTENCES]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_stands_at_its_depth_and_at_a_sentence_end(tokenizer, depth):
    task = make_task(PasskeyConfig(), tokenizer)
    for index in range(10):
        sample = task.sample(rng_for("train", 0, index), 400, depth)
        text = text_of(tokenizer, sample)
        before, _, after = text.partition(" The pass key is")
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.1)
        assert before == "" or before.endswith(".")
        assert sample.depths[0] == pytest.approx(depth, abs=0.06)


def test_random_depth_covers_the_context(tokenizer):
    task = make_task(PasskeyConfig(), tokenizer)
    depths = [task.sample(rng_for("train", 0, i), 300).depths[0] for i in range(200)]
    assert min(depths) < 0.05 and max(depths) > 0.95
    assert 0.4 < sum(depths) / len(depths) < 0.6


def test_avoid_tail_keeps_the_needle_out_of_the_last_tokens(tokenizer):
    task = make_task(PasskeyConfig(avoid_tail=64), tokenizer)
    for index in range(50):
        sample = task.sample(rng_for("train", 0, index), 200, depth=1.0 if index % 2 else None)
        assert sample.questions[0].answers[0] not in tokenizer.decode(sample.context[-64:])
        assert sample.questions[0].answers[0] in tokenizer.decode(sample.context[:-64])


def test_the_shortest_length_is_named_and_works(tokenizer):
    task = make_task(PasskeyConfig(), tokenizer)
    with pytest.raises(ValueError, match=r"length 12 is too short .* at least (\d+) tokens") as error:
        task.sample(rng_for("train", 0, 0), 12)
    shortest = int(str(error.value).split("at least ")[1].split()[0])
    assert task.sample(rng_for("train", 0, 0), shortest).length == shortest
    with pytest.raises(ValueError, match="too short"):
        task.sample(rng_for("train", 0, 0), shortest - 1)


def test_needle_question_and_answer_fit_in_a_window_of_32(tokenizer):
    sample = make_task(PasskeyConfig(), tokenizer).sample(rng_for("train", 0, 0), 32)
    assert sample.questions[0].answers[0] in text_of(tokenizer, sample)


def test_hide_puts_needles_in_the_order_of_their_depths():
    class Filler:
        def draw(self, rng, n_tokens):
            return [[7, 7, 7, 0]] * (n_tokens // 4 + 1)

    context, got = hide(rng_for("train", 0, 0), Filler(), [[1], [2, 2], [3]], [0.9, 0.51, 0.5], 30, start=[9])
    assert len(context) == 30 and context[0] == 9
    assert [t for t in context if t in (1, 2, 3)] == [3, 2, 2, 1]
    assert got[2] < got[1] < got[0]
    for at, token in enumerate(context):
        if token in (1, 2, 3):
            assert context[at - 1] in (0, 9, 1, 2, 3), "not at a sentence end"


def test_same_seed_same_item_and_other_index_another(tokenizer):
    task = make_task(PasskeyConfig(), tokenizer)
    first = task.sample(rng_for("train", 5, 1), 128)
    assert first == make_task(PasskeyConfig(), tokenizer).sample(rng_for("train", 5, 1), 128)
    assert first != task.sample(rng_for("train", 5, 2), 128)
    assert first != task.sample(rng_for("train", 6, 1), 128)


def test_train_and_eval_never_share_a_key(tokenizer):
    keys = {}
    for split in ("train", "eval"):
        task = make_task(PasskeyConfig(digits=3), tokenizer, split)
        keys[split] = {task.sample(rng_for(split, 0, i), 64).questions[0].answers[0] for i in range(600)}
        assert all(split_of(key) == split for key in keys[split])
    assert not keys["train"] & keys["eval"]
    assert len(keys["eval"]) > 100


def test_rng_of_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        rng_for("test", 0, 0)


def test_keys_and_values_are_unique(tokenizer):
    sample = make_task(NeedleConfig(n_keys=6, n_values=2, digits=2), tokenizer).sample(
        rng_for("train", 0, 0), 900
    )
    numbers = SPANS["number"].findall(text_of(tokenizer, sample))
    assert len(numbers) == 12 == len(set(numbers))


def test_too_few_keys_in_the_space_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no number left to draw"):
        make_task(NeedleConfig(n_keys=9, digits=1), tokenizer).sample(rng_for("train", 0, 0), 900)


def test_noise_and_words_hold_no_answer():
    # An object is any word: fact updates leave sentences out that name one.
    patterns = [pattern for kind, pattern in SPANS.items() if kind != "object"]
    assert not any(pattern.search(sentence) for pattern in patterns for sentence in NOISE_SENTENCES)
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)
    assert all(word.isalpha() and word.islower() for word in (*ADJECTIVES, *NOUNS))


def test_a_tokenizer_that_cannot_spell_the_needle_is_named():
    words = {word: at for at, word in enumerate(["[UNK]", "The", "pass", "key", "is", "."])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    poor = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", name_or_path="poor-words")
    with pytest.raises(
        ValueError, match=r"'poor-words' cannot spell the needle ' The pass key is 1234567\.'"
    ):
        make_task(PasskeyConfig(), poor)


def test_a_tokenizer_that_loses_characters_is_named(tokenizer):
    lossy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    lossy.backend_tokenizer.normalizer = normalizers.Replace("7", "1")
    with pytest.raises(ValueError, match="cannot spell the needle"):
        make_task(PasskeyConfig(), lossy)


@pytest.fixture
def prose(tmp_path):
    sentences = [
        f"Sentence {word} tells of {noun}s and more." for word in ADJECTIVES[:20] for noun in NOUNS[:5]
    ]
    sentences[3] = "In 1806 a number stood here."
    path = tmp_path / "prose.txt"
    path.write_text("\n\n".join(" ".join(sentences[i : i + 10]) for i in range(0, 100, 10)), encoding="utf-8")
    return path, sentences


def test_prose_train_and_eval_read_disjoint_parts(tokenizer, prose):
    path, sentences = prose
    config = PasskeyConfig(filler="prose", prose_file=str(path))
    seen = {}
    for split in ("train", "eval"):
        task = make_task(config, tokenizer, split)
        texts = [text_of(tokenizer, task.sample(rng_for(split, 0, i), 600, depth=1.0)) for i in range(30)]
        seen[split] = {s for s in sentences for text in texts if s in text}
    assert not seen["train"] & seen["eval"]
    assert seen["train"] <= set(sentences[:80]) and seen["eval"] <= set(sentences[80:])
    assert len(seen["train"]) > 70 and len(seen["eval"]) == 20
    assert not any("1806" in s for s in seen["train"])


def test_prose_runs_in_its_order(tokenizer, prose):
    path, sentences = prose
    task = make_task(PasskeyConfig(filler="prose", prose_file=str(path)), tokenizer)
    text = text_of(tokenizer, task.sample(rng_for("train", 0, 4), 400, depth=1.0))
    found = sorted((text.index(s), sentences.index(s)) for s in sentences if s in text)
    order = [index for _, index in found]
    assert len(order) >= 3
    assert all(b - a in (1, 2) or b < a for a, b in itertools.pairwise(order))


def test_prose_errors(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="prose_file"):
        PasskeyConfig(filler="prose")
    with pytest.raises(ConfigError, match="prose_file"):
        PasskeyConfig(prose_file="book.txt")
    with pytest.raises(FileNotFoundError, match="no file"):
        make_task(PasskeyConfig(filler="prose", prose_file=str(tmp_path / "none.txt")), tokenizer)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(ValueError, match="no sentence"):
        make_task(PasskeyConfig(filler="prose", prose_file=str(empty)), tokenizer)
    empty.write_bytes(b"A house. \xff")
    with pytest.raises(ConfigError, match=r"prose_file: .*empty\.txt: not UTF-8"):
        make_task(PasskeyConfig(filler="prose", prose_file=str(empty)), tokenizer)


def test_the_mark_before_a_prose_file_is_no_text(tokenizer, tmp_path, prose):
    path, marked = prose[0], tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    drawn = [
        make_task(PasskeyConfig(filler="prose", prose_file=str(p)), tokenizer).filler.sentences
        for p in (path, marked)
    ]
    assert drawn[0] == drawn[1]


def test_split_sentences():
    text = "One here. Two\nthere! ‘Three?’ Four…\n\nA HEADING\n\nLast"
    assert split_sentences(text) == ["One here.", "Two there!", "‘Three?’", "Four…", "A HEADING", "Last"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_keys": 2, "n_queries": 2, "n_questions": 2}, "n_keys"),
        ({"needle": " nothing"}, "needle"),
        ({"question": " nothing"}, "question"),
        ({"n_value": 2}, "did you mean 'n_values'"),
    ],
)
def test_wrong_fields_are_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        NeedleConfig(**fields)


def test_a_key_without_a_place_in_the_needle_is_an_error():
    with pytest.raises(ConfigError, match="needle"):
        PasskeyConfig(needle=" The key is hidden.")


def test_many_answers_are_named_in_the_order_of_the_haystack(tokenizer):
    task = make_task(NeedleConfig(n_values=4), tokenizer)
    for index in range(10):
        sample = task.sample(rng_for("train", 0, index), 500)
        text = text_of(tokenizer, sample)
        places = [text.index(answer) for answer in sample.questions[0].answers]
        assert places == sorted(places)


def test_questions_of_one_haystack_ask_for_different_keys(tokenizer):
    sample = make_task(NeedleConfig(n_keys=6, n_queries=2, n_questions=3), tokenizer).sample(
        rng_for("train", 0, 0), 900
    )
    answers = [answer for question in sample.questions for answer in question.answers]
    assert len(answers) == 6 == len(set(answers))
