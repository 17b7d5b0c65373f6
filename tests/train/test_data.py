"""Every batch is a function of seed, position and process."""

import json

import datasets
import pytest
import torch

import memlayers as ml
from memlayers.config import validate
from memlayers.train.config import TrainConfig
from memlayers.train.curriculum import Curriculum
from memlayers.train.data import ANSWER, Example, collate
from memlayers.train.snapshot import Progress
from memlayers.train.sources import make_source

TEXT = "\n".join(f"Line {i} tells of a house, a river and the {i}th tree." for i in range(200))
LINES = [
    {"context": f"The tree has {i} leaves.", "question": " Leaves:", "answer": f" {i}"} for i in range(10)
]


@pytest.fixture
def data_of(tmp_path):
    """A data section of every type, with its files."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    )
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    datasets.Dataset.from_dict({"body": TEXT.splitlines()}).save_to_disk(tmp_path / "table")
    dataset = {"type": "dataset", "path": str(tmp_path / "table"), "text_field": "body", "length": 20}
    return {
        "task": {"type": "task", "task": {"type": "passkey", "digits": 3}, "segments": 2},
        "needle": {
            "type": "task",
            "task": {"type": "needle", "n_keys": 2, "n_questions": 2, "digits": 3},
            "segments": 4,
            "segment_length": 40,
        },
        "text": {"type": "text", "files": [str(tmp_path / "*.txt")], "length": 20},
        "jsonl text": {"type": "jsonl", "files": [str(tmp_path / "text.jsonl")], "length": 20},
        "jsonl questions": {"type": "jsonl", "files": [str(tmp_path / "asked.jsonl")], "length": 60},
        "dataset": dataset,
        "streaming": {**dataset, "streaming": True, "shuffle_buffer": 7},
    }


KINDS = ["task", "needle", "text", "jsonl text", "jsonl questions", "dataset", "streaming"]


def source_of(fields, data, tokenizer, **changes):
    return make_source(validate(TrainConfig, fields(data=data, **changes)), tokenizer, window=24)


def ids(batch) -> torch.Tensor:
    parts = [batch.context_ids] if batch.context_ids is not None else []
    return torch.cat([*parts, batch.input_ids], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_depends_on_its_place_alone(kind, data_of, fields, tokenizer):
    data = data_of[kind]
    segments = data.get("segments")
    straight = source_of(fields, data, tokenizer)
    read = [straight.batch(i, 0, 1, segments) for i in range(8)]
    resumed = source_of(fields, data, tokenizer)
    for place in (5, 6, 2):  # on, then back
        assert torch.equal(ids(resumed.batch(place, 0, 1, segments)), ids(read[place]))
    assert not torch.equal(ids(read[0]), ids(read[1]))
    other = source_of(fields, data, tokenizer, seed=1)
    assert not torch.equal(ids(other.batch(0, 0, 1, segments)), ids(read[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_items_of_one(kind, data_of, fields, tokenizer):
    data = data_of[kind]
    if kind == "jsonl questions":
        data = {**data, "regime": "W"}  # so that rows of both batches are equally wide
    segments = data.get("segments")
    alone = source_of(fields, data, tokenizer, batch_size=6).batch(1, 0, 1, segments)
    ranks = [source_of(fields, data, tokenizer, batch_size=3).batch(1, r, 2, segments) for r in range(2)]
    rows = [row[row != 0].tolist() for batch in ranks for row in ids(batch)]
    assert rows == [row[row != 0].tolist() for row in ids(alone)]


def test_an_epoch_reads_every_item_once_and_the_next_in_another_order(data_of, fields, tokenizer):
    source = source_of(fields, data_of["jsonl questions"], tokenizer, batch_size=5)
    rows = [tuple(row.tolist()) for i in range(4) for row in source.batch(i).context_ids]
    first, second = (
        [str(row).replace(" 0,", "") for row in rows[:10]],
        [str(r).replace(" 0,", "") for r in rows[10:]],
    )
    assert len(set(first)) == 10
    assert set(first) == set(second)
    assert first != second


def test_task_items_have_the_exact_length(data_of, fields, tokenizer):
    source = source_of(fields, data_of["task"], tokenizer)
    for segments in (1, 3):
        batch = source.batch(0, 0, 1, segments)
        assert ids(batch).shape == (4, 24 * segments)
        assert batch.context_mask is None
        assert batch.attention_mask is None
        texts = [
            tokenizer.decode(row[part == ANSWER]).strip() for row, part in zip(batch.input_ids, batch.parts)
        ]
        assert all(len(text) == 4 and text[:3].isdigit() and text[3] == "." for text in texts)
        for row, key in zip(batch.context_ids, texts):
            assert f"The pass key is {key}" in tokenizer.decode(row)


def test_stage_zero_leaves_the_needle_in_attention(data_of, fields, tokenizer):
    source = source_of(fields, data_of["task"], tokenizer)
    batch = source.batch(0, 0, 1, 0)
    assert batch.context_ids is None
    assert batch.input_ids.shape == (4, 24)
    for row, part in zip(batch.input_ids, batch.parts):
        key = tokenizer.decode(row[part == ANSWER]).strip()
        assert tokenizer.decode(row).count(f"The pass key is {key}") == 2


def test_packed_text_is_the_text(data_of, fields, tokenizer):
    source = source_of(fields, data_of["text"], tokenizer)
    pieces = [tokenizer.decode(source.examples[i].answer) for i in range(len(source.examples))]
    assert TEXT.startswith("".join(pieces).removeprefix("<s>"))


def test_rows_are_padded_on_the_left():
    examples = [Example([5, 6, 7], [8], [9, 9]), Example([5], [8, 8], [9])]
    apart = collate(examples, "D")
    assert apart.context_ids.tolist() == [[5, 6, 7], [0, 0, 5]]
    assert apart.context_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert apart.parts.tolist() == [[2, 3, 3], [2, 2, 3]]
    one = collate(examples, "W")
    assert one.input_ids.tolist() == [[5, 6, 7, 8, 9, 9], [0, 0, 5, 8, 8, 9]]
    assert one.attention_mask.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    assert one.parts.tolist() == [[1, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 3]]
    assert one.tail == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", " \n", "is empty"),
        ("short.txt", "a house", "less than one sequence of 20 tokens"),
        ("cut.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("foreign.jsonl", '{"words": "a"}\n', "line 1 needs the field text"),
        (
            "mixed.jsonl",
            '{"text": "a"}\n{"context": "a", "question": "b", "answer": "c"}\n',
            "line 2 has other fields",
        ),
        (
            "long.jsonl",
            json.dumps({"context": "a b c " * 50, "question": "?", "answer": "d"}),
            "data.length: an item",
        ),
        (None, "", "data.files.0: no file matches"),
    ],
)
def test_bad_files(name, content, told, fields, tokenizer, tmp_path):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(content)
    kind = "jsonl" if path.suffix == ".jsonl" else "text"
    with pytest.raises(ml.ConfigError) as error:
        source_of(fields, {"type": kind, "files": [str(path)], "length": 20}, tokenizer)
    assert told in str(error.value)


def test_a_dataset_without_the_field(data_of, fields, tokenizer):
    with pytest.raises(ml.ConfigError, match=r"data\.text_field: .* has no 'text'; it has body"):
        source_of(fields, {**data_of["dataset"], "text_field": "text"}, tokenizer)


def test_curriculum(config, fields):
    data = {k: v for k, v in fields()["data"].items() if k != "segments"}
    section = {"segments": [1, 2, 4], "threshold": 0.75, "window": 2, "current_share": 0.5}
    progress = Progress()
    curriculum = Curriculum(config(data=data, curriculum=section, stop_at=0.9), progress)
    assert {curriculum.draw(step) for step in range(20)} == {1}
    curriculum.update(1, 1.0)
    assert curriculum.stage_segments == 1  # the window is not full
    curriculum.update(1, 0.5)
    assert curriculum.stage_segments == 2
    curriculum.update(1, 1.0)  # another stage's accuracy does not count
    curriculum.update(1, 1.0)
    assert curriculum.stage_segments == 2
    curriculum.update(2, 1.0)
    curriculum.update(2, 1.0)
    assert curriculum.stage_segments == 4
    drawn = [curriculum.draw(step) for step in range(300)]
    assert set(drawn) == {1, 2, 4}
    assert 0.4 < drawn.count(4) / 300 < 0.6
    assert not curriculum.reached(0.9)
    curriculum.update(4, 1.0)
    curriculum.update(4, 0.9)
    assert curriculum.reached(0.9)
    again = Curriculum(config(data=data, curriculum=section), progress)
    assert [again.draw(step) for step in range(300)] == drawn
