"""Which source of batches a config describes, and reading text, JSON lines and datasets."""

from __future__ import annotations

import glob
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets

from memlayers.config import ConfigError
from memlayers.limits import MOST_TOKENS
from memlayers.tasks import FactsTask, ProceduresTask, rng_for

from .config import DatasetData, FactsData, ProceduresData, TaskData, TextData, TrainConfig
from .data import Batch, Example, ExampleSource, TaskSource, collate
from .kinds import that_do
from .texts import read_file, read_jsonl, text_ids


def make_source(config: TrainConfig, tokenizer, window: int | None) -> Source:
    """The source that `config.data` describes.

    Args:
        window: tokens that attention of the wrapped model can reach, the default segment of a task.

    Raises:
        ConfigError: files that are not there, no text, lines that hold something else, items that do not fit; names
            the field.
    """
    data, batch_size, seed = config.data, config.batch_size, config.seed
    if isinstance(data, TaskData):
        if data.segment_length is None and window is None:
            raise ConfigError(
                "data.segment_length: needed, because no memory gives this model a segment length"
            )
        source = TaskSource(data, tokenizer, data.segment_length or window, batch_size, seed)
        stages = config.curriculum.stages if config.curriculum else [data.segments]
        _check_batch(batch_size, stages[-1] * source.segment_length)
        _check_lengths(source, stages)
        return source
    if isinstance(data, FactsData):
        return ExampleSource(_facts(data, tokenizer), "P", batch_size, seed, has_accuracy=True)
    if isinstance(data, ProceduresData):
        return ExampleSource(_procedures(data, tokenizer), "F", batch_size, seed, has_accuracy=True)
    _check_batch(batch_size, data.length)
    if isinstance(data, DatasetData) and data.streaming:
        return StreamSource(data, tokenizer, batch_size, seed)
    if isinstance(data, DatasetData):
        table = _open_dataset(data)
        _check_field(table, data)
        return _packed(
            table, data.text_field, data.length, tokenizer, batch_size, seed, f"data.path: {data.path!r}"
        )
    paths = _expand(data.files)
    if isinstance(data, TextData):
        table = datasets.Dataset.from_list([{"text": read_file(path)} for path in paths])
        return _packed(table, "text", data.length, tokenizer, batch_size, seed, "data.files")
    lines = read_jsonl(paths)
    if "text" in lines[0]:
        table = datasets.Dataset.from_list([{"text": line["text"]} for line in lines])
        return _packed(table, "text", data.length, tokenizer, batch_size, seed, "data.files")
    examples = [_question_line(line, tokenizer, data.length) for line in lines]
    return ExampleSource(examples, data.regime, batch_size, seed, has_accuracy=True)


def _check_batch(batch_size: int, length: int) -> None:
    if batch_size * length > MOST_TOKENS:
        raise ConfigError(
            f"batch_size: {batch_size:,} items of {length:,} tokens are more than {MOST_TOKENS:,} in a forward pass; lower "
            "it, or the length or segments of data"
        )


def _check_lengths(source: TaskSource, stages: list[int]) -> None:
    for stage in (stages[0], stages[-1]):
        try:
            source.task.sample(rng_for("train", 0, 0), max(stage, 1) * source.segment_length)
        except ValueError as error:
            raise ConfigError(f"data: {stage} segments of {source.segment_length} tokens: {error}") from None


def _facts(data: FactsData, tokenizer) -> list[Example]:
    """Every fact of the batch, and those rehearsed, in every training prompt."""
    task = FactsTask(data.facts, tokenizer)
    facts = task.later if data.batch == "later" else task.first
    facts = facts + random.Random(f"memlayers:rehearse:{data.facts.seed}").sample(task.first, data.rehearse)
    asked = task.questions(facts, "trained")
    return [Example((), [*task.bos, *q.ids], q.answer_ids) for questions in asked for q in questions]


def _procedures(data: ProceduresData, tokenizer) -> list[Example]:
    """`uses` of every procedure, each called by its token, which the tokenizer has of a memory."""
    try:
        task = ProceduresTask(data.procedures, tokenizer)
        procedures = task.new(data.n, data.seed)[data.first :]
    except ValueError as error:
        raise ConfigError(f"data.procedures: {error}") from None
    called = {token.strip("<|>"): index for token, index in tokenizer.get_added_vocab().items()}
    examples = []
    if lacking := [p.name for p in procedures if p.name not in called]:
        raise ConfigError(
            f"data: there is no task token for {lacking[0]!r} (nor for {len(lacking) - 1} others); put the names into "
            f"names of the memory of type {that_do('add_to_tokenizer')}"
        )
    for at, procedure in enumerate(procedures, start=data.first):
        rng = random.Random(f"memlayers:uses:{data.seed}:{at}")
        for _ in range(data.uses):
            use = task.use(procedure, task.draw(rng, "train"))
            examples.append(Example((), use.prompt, [called[procedure.name], *use.answer]))
    return examples


class PackedSequences(Sequence):
    """A `datasets` table of token ids in equal pieces, read from disk as it is needed."""

    def __init__(self, table: datasets.Dataset):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        return Example((), (), self.table[index]["ids"])


class StreamSource:
    """A streamed dataset, packed on the way. Going back or resuming reads it again from its start."""

    has_accuracy, by_item, regime = False, False, "W"

    def __init__(self, data: DatasetData, tokenizer, batch_size: int, seed: int):
        self.data, self.tokenizer, self.batch_size, self.seed = data, tokenizer, batch_size, seed
        self._next, self._pieces = 0, self._read()

    def batch(self, position: int, rank: int = 0, world: int = 1, segments: int | None = None) -> Batch:
        first = (position * world + rank) * self.batch_size
        if first < self._next:
            self._next, self._pieces = 0, self._read()
        pieces = list(islice(self._pieces, first - self._next, first - self._next + self.batch_size))
        self._next = first + self.batch_size
        return collate([Example((), (), piece) for piece in pieces], "W")

    def _read(self) -> Iterator[list[int]]:
        """Pieces of `length` tokens without end, epoch after epoch."""
        table, rest, epoch = _open_dataset(self.data), [], 0
        _check_field(table, self.data)
        table = table.shuffle(seed=self.seed, buffer_size=self.data.shuffle_buffer)
        while True:
            table.set_epoch(epoch)
            before = epoch, len(rest)
            for row in table:
                rest += text_ids(self.tokenizer, row[self.data.text_field])
                while len(rest) >= self.data.length:
                    yield rest[: self.data.length]
                    rest, before = rest[self.data.length :], None
            if before is not None and before[1] == len(rest):
                raise ConfigError(f"data.path: {self.data.path!r} has no text in split {self.data.split!r}")
            epoch += 1


Source = TaskSource | ExampleSource | StreamSource


def _packed(
    table, field: str, length: int, tokenizer, batch_size: int, seed: int, where: str
) -> ExampleSource:
    """Tokenise `field`, put the texts end to end and cut them into pieces; the last, short one is dropped."""

    def pack(rows: dict) -> dict:
        ids = [token for text in rows[field] for token in text_ids(tokenizer, text)]
        return {"ids": [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]}

    table = table.map(pack, batched=True, remove_columns=table.column_names, load_from_cache_file=False)
    if len(table) == 0:
        raise ConfigError(
            f"{where}: holds less than one sequence of {length} tokens; give more text or a lower length"
        )
    return ExampleSource(PackedSequences(table), "W", batch_size, seed, has_accuracy=False)


def _question_line(line: dict, tokenizer, longest: int) -> Example:
    context = tokenizer(line["context"], verbose=False)["input_ids"]
    question = tokenizer(line["question"], add_special_tokens=False)["input_ids"]
    answer = tokenizer(line["answer"], add_special_tokens=False)["input_ids"]
    total = len(context) + len(question) + len(answer)
    if total > longest:
        raise ConfigError(
            f"data.length: an item has {total} tokens, more than {longest}; raise it or shorten the item"
        )
    return Example(context, question, answer)


def _expand(patterns: list[str]) -> list[str]:
    paths = []
    for place, pattern in enumerate(patterns):
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not found:
            raise ConfigError(f"data.files.{place}: no file matches {pattern!r}")
        paths += found
    return paths


def _open_dataset(data: DatasetData):
    folder = Path(data.path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        table = datasets.load_from_disk(data.path)
        if isinstance(table, datasets.DatasetDict):
            if data.split not in table:
                raise ConfigError(f"data.split: {data.path} has no {data.split!r}; it has {', '.join(table)}")
            table = table[data.split]
        return table.to_iterable_dataset() if data.streaming else table
    try:
        return datasets.load_dataset(data.path, data.name, split=data.split, streaming=data.streaming)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"data.path: cannot load {data.path!r}, split {data.split!r}: {error}") from None


def _check_field(table, data: DatasetData) -> None:
    columns = table.column_names
    if columns is not None and data.text_field not in columns:
        raise ConfigError(
            f"data.text_field: {data.path!r} has no {data.text_field!r}; it has {', '.join(columns)}"
        )
