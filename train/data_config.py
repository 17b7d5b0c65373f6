"""The `data` section of a training YAML: what a run reads, by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from memlayers.config import ConfigError, Strict
from memlayers.limits import Count, Scale, Seed, Tokens
from memlayers.tasks import FactsConfig, ProceduresConfig, TaskConfig

Regime = Literal["D", "W", "F"]
MOST_USES = 10_000_000
"""Uses of procedures that are kept as a list."""


class TaskData(Strict):
    """Items that a task of `memlayers.tasks` makes, without end.

    Attributes:
        task: which task, and its fields.
        regime: `D` writes the context, drops the window, asks with memory alone; `W` runs context, question
            and answer as one sequence through the wrapped model; `F` the same with full attention.
        segment_length: tokens a segment counts for lengths; None: the window of the wrapped model.
        segments: fixed number of segments of an item (context, question and answer); None with a curriculum.
    """

    type: Literal["task"] = "task"
    task: TaskConfig
    regime: Regime = "D"
    segment_length: Tokens | None = None
    segments: Count | None = None


class TextData(Strict):
    """Local text files, tokenised and packed into sequences of `length` tokens.

    Attributes:
        files: paths or globs; every one must match.
        length: tokens of a sequence.
    """

    type: Literal["text"] = "text"
    files: list[str] = Field(min_length=1)
    length: Tokens = Field(512, ge=2)


class JsonlData(Strict):
    """Local JSON lines: `text` (packed as in `text`), or `context`, `question` and `answer`.

    Attributes:
        files: paths or globs; every one must match.
        length: tokens of a packed sequence; for question lines the most a whole item may have.
        regime: how question lines run, see `TaskData`.
    """

    type: Literal["jsonl"] = "jsonl"
    files: list[str] = Field(min_length=1)
    length: Tokens = Field(512, ge=2)
    regime: Regime = "D"


class DatasetData(Strict):
    """A dataset of the `datasets` library, packed into sequences of `length` tokens.

    Attributes:
        path: name on the hub, a folder, or what `Dataset.save_to_disk` wrote.
        name: configuration of the dataset.
        split: which split, slices such as `train[:1%]` included.
        text_field: column with the text.
        length: tokens of a sequence.
        streaming: read while training; then order is the dataset's, shuffled in a buffer.
        shuffle_buffer: rows of that buffer.
    """

    type: Literal["dataset"] = "dataset"
    path: str
    name: str | None = None
    split: str = "train"
    text_field: str = "text"
    length: Tokens = Field(512, ge=2)
    streaming: bool = False
    shuffle_buffer: Count = 1000


class FactsData(Strict):
    """Fictional facts, taught without context: every fact in every training prompt is one item of an epoch.

    Attributes:
        facts: which facts; evaluation asks for the same ones when its block is the same.
        batch: the first batch, or the one to learn later.
        rehearse: facts of the first batch, drawn once, that are taught along with the later one.
    """

    type: Literal["facts"] = "facts"
    facts: FactsConfig = FactsConfig()
    batch: Literal["first", "later"] = "first"
    rehearse: int = Field(0, ge=0, le=1_000_000)

    @model_validator(mode="after")
    def _has_facts(self):
        if self.batch == "later" and self.facts.n_later == 0:
            raise ConfigError("facts.n_later: 0 facts are in the batch that is to be taught")
        most = self.facts.n_facts if self.batch == "later" else 0
        if self.rehearse > most:
            raise ConfigError(f"rehearse: at most {most} facts of the first batch are not taught anyway")
        return self


class ProceduresData(Strict):
    """Uses of new procedures (`memlayers.tasks.procedures`), each to be called by a token of its own: the name and
    symbols, then the token and the answer. A memory that adds tokens, such as `task_tokens`, has the names.

    Attributes:
        procedures: the words, orders and maps of the base; equal to what is in its procedures.json.
        n, seed: `ProceduresTask.new(n, seed)` are those to learn.
        first: the first of them that this run learns, counted from 0.
        uses: of each procedure, drawn once.
    """

    type: Literal["procedures"] = "procedures"
    procedures: ProceduresConfig = ProceduresConfig()
    n: Count = 16
    seed: Seed = 0
    first: int = Field(0, ge=0, le=1_000_000)
    uses: Count = 200

    @model_validator(mode="after")
    def _some_are_left(self):
        if self.first >= self.n:
            raise ConfigError(f"first: {self.first} leaves none of {self.n} procedures")
        if self.n * self.uses > MOST_USES:
            raise ConfigError(
                f"uses: {self.uses:,} of {self.n:,} procedures are more than {MOST_USES:,} in all"
            )
        return self


AnyData = Annotated[
    TaskData | TextData | JsonlData | DatasetData | FactsData | ProceduresData, Field(discriminator="type")
]


class BackgroundSection(Strict):
    """Keeps old text as it was: KL(base || model) on a batch of it is added to the loss of every step, see
    `memlayers.train.background`.

    Attributes:
        files: ordinary text: paths or globs.
        length: tokens of a sequence.
        batch_size: sequences a process reads beside each batch of the data.
        neighbours: with data of type facts, prompts about subjects of no batch that are read along with them; what
            the base says to them is kept too. Evaluation asks about other subjects.
        weight: of the divergence.
    """

    files: list[str] = Field(min_length=1)
    length: Tokens = Field(64, ge=2)
    batch_size: Count = 8
    neighbours: int = Field(0, ge=0, le=1_000_000)
    weight: Scale = 1.0
