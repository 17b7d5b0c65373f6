"""Where task tokens sit in a model: behind the rows of its input embedding and of its head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import ConfigError
from ..core.memory import Memory
from ..core.model import memories, without_adapters
from .config import TaskTokensConfig
from .covers import Embedding, Head, Loss, Resize, TransitionScores, embed_scale
from .module import BaseRows, TaskRows
from .procedure import Procedure, sample
from .tokenizer import add_to_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaskTokens(Memory):
    """A bank of procedures, each a word behind the base's vocabulary (TokMem, "Tokenized procedural memory").

    With it logits are (..., V + places): the first V are the base's, bit for bit, for texts without task tokens. The
    base has no new rows: its tensors, `config.vocab_size` and tokenizer stay as they are.

    A procedure's id is V plus its place in `config.names`, and stays its id until it is removed, or the base's embedding is
    resized: then V is the new number of rows, and a tokenizer that knows the procedures is to be made anew. Its place is then free:
    it is never predicted (a logit of -inf; the least there is where the base caps logits by a tanh), reading its id is an
    error, and the next procedure that is added takes the lowest free place. So a tokenizer that still knows a
    removed procedure is out of date; make a new one from the base's with `add_to_tokenizer`.

    `config` always says what is there: adding, removing and `learn` put a new one.

    Attributes:
        rows: `TaskRows`, all that learns.
        first_id: V, rows of the base's input embedding; ids from there on are procedures.
        base: `BaseRows` of the embedding and of the head.
    """

    def __init__(self, config: TaskTokensConfig, embedding: nn.Module, head: nn.Module):
        super().__init__(config)
        tied = head.weight is embedding.weight
        self.base = {"input": BaseRows(embedding), "output": BaseRows(head)}
        self.first_id = embedding.weight.shape[0]
        self.rows = TaskRows(tied if config.tied is None else config.tied)
        self.rows.n_places = len(config.names)
        for place, name in enumerate(config.names):
            if name is not None:
                self.rows.put(place, self._new_rows())
        self.learn(config.train)

    @classmethod
    def for_model(cls, config: TaskTokensConfig, model: nn.Module) -> TaskTokens:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        kind = type(model).__name__
        if present := list(task_tokens(model)):
            raise ConfigError(
                f"names: this model has task tokens, memory {present[0]!r}; add these to it with its method add"
            )
        if config.tied and head.weight is not embedding.weight:
            raise ConfigError(
                f"tied: the head of {kind} is not tied to its embedding, so that one row cannot both be read and "
                "predict; set false, or leave it out"
            )
        if head.weight.shape[0] != embedding.weight.shape[0]:
            raise ConfigError(
                f"type: {kind} has {embedding.weight.shape[0]} rows in its embedding and {head.weight.shape[0]} in its "
                "head, so that a task token has no place behind both"
            )
        if embedding.weight.is_meta or head.weight.is_meta:
            raise ConfigError(
                f"type: accelerate keeps the embedding or the head of {kind} elsewhere, so that their rows cannot be looked up; "
                "give both a device in device_map"
            )
        some = torch.arange(2, device=embedding.weight.device)
        with torch.no_grad():
            own = without_adapters(embedding)
            if not torch.equal(own(some), own.weight[some] * embed_scale(own)):
                raise ConfigError(f"type: the input embedding of {kind} does more than look rows up")
        return cls(config, embedding, head)

    def install(self, model: nn.Module) -> list:
        hooks = self.sit_on(model)
        hooks.insert(0, Resize(self, model, hooks))
        return hooks

    def sit_on(self, model: nn.Module) -> list:
        """Put the hooks on the model's embedding and head as they are now; ids begin behind the embedding's last row."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.base = {"input": BaseRows(embedding), "output": BaseRows(head)}
        self.first_id = embedding.weight.shape[0]
        return [Embedding(self, embedding), Head(self, head), Loss(model), TransitionScores(model)]

    @property
    def needs_head(self) -> bool:
        return self.rows.n_places > 0

    @property
    def names(self) -> list[str]:
        """The procedures, in the order of their ids."""
        return [name for name in self.config.names if name is not None]

    @property
    def tied(self) -> bool:
        """Whether the row that is read also predicts."""
        return self.rows.output is None

    def id_of(self, name: str) -> int:
        """The token id of a procedure.

        Raises:
            KeyError: there is none of that name, or no longer.
        """
        return self.first_id + self._place(name)

    def add(
        self,
        name: str,
        *,
        init_from: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> int:
        """A new procedure, whose row learns; those that are there do not change. Optimizers made before know nothing
        of it.

        Args:
            name: of the procedure.
            init_from: a text that says what it does: the row starts at the mean of its tokens' rows. None: at the
                mean of all rows and a little noise.
            tokenizer: of the base, for `init_from`.

        Returns:
            Its token id.

        Raises:
            ValueError: the name is taken; `init_from` has no tokens, or comes without a tokenizer.
        """
        if init_from is None:
            return self._put(name, self._new_rows())
        if tokenizer is None:
            raise ValueError("init_from is a text: give the base's tokenizer= too")
        return self._put(name, self._new_rows(self._base_tokens(init_from, tokenizer, "init_from")))

    def start_from_texts_(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the rows named in `config.init_from` to where their texts say, whatever they have learned.

        Raises:
            ConfigError: a text without tokens of the base; no row has then changed.
        """
        texts = self.config.init_from
        ids = {n: self._base_tokens(text, tokenizer, f"init_from.{n}") for n, text in texts.items()}
        for name in texts:
            for side, row in self._new_rows(ids[name]).items():
                self.rows.sides()[side][str(self._place(name))].data.copy_(row)

    def remove(self, name: str) -> None:
        """Take a procedure out; the others keep their ids, and its place is free.

        Raises:
            KeyError: there is none of that name.
        """
        place, names, train = self._place(name), list(self.config.names), self.config.train
        names[place] = None
        self._set(
            names=names,
            train=None if train is None else [n for n in train if n != name],
            init_from={n: text for n, text in self.config.init_from.items() if n != name},
        )
        self.rows.drop(place)

    def export(self, name: str, path: str | Path) -> None:
        """Write one procedure to a safetensors file: its rows, its name, and which base it is for.

        Raises:
            KeyError: there is none of that name.
        """
        place, embedding = str(self._place(name)), self.base["input"].module.weight
        rows = {side: rows[place] for side, rows in self.rows.sides().items()}
        Procedure(name, rows, sample(embedding), self.first_id).save(path)

    def add_exported(self, path: str | Path, name: str | None = None, *, verify: bool = True) -> int:
        """Add a procedure that `export` wrote, here or in another model on the same base.

        Args:
            name: what to call it; by default as in the file.
            verify: compare the file's checksums; False takes what is there.

        Returns:
            Its token id.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: no such file, one for another base, or the name is taken.
        """
        procedure, embedding = Procedure.load(path, verify=verify), self.base["input"].module.weight
        procedure.check_base(embedding, self.tied, path)
        for side, row in procedure.rows.items():
            width = self.base[side].module.weight.shape[1]
            if len(row) != width:
                raise ValueError(f"{path}: tensor {side!r} has {len(row)} numbers, this base takes {width}")
        rows = {side: nn.Parameter(row.float().to(embedding.device)) for side, row in procedure.rows.items()}
        return self._put(procedure.name if name is None else name, rows)

    def learn(self, names: list[str] | None) -> None:
        """Choose the procedures whose rows learn, None for all; the others get no gradient.

        Raises:
            ConfigError: one that is not there.
        """
        self._set(train=names)
        for rows in self.rows.sides().values():
            for place, row in rows.items():
                row.requires_grad_(self.learns(int(place)))

    def learns(self, place: int) -> bool:
        """Whether the config lets the row at a place learn."""
        return self.config.train is None or self.config.names[place] in self.config.train

    def frozen_parameters(self) -> set[str]:
        return {
            f"rows.{side}.{place}"
            for side, rows in self.rows.sides().items()
            for place in rows
            if not self.learns(int(place))
        }

    def after_step(self) -> None:
        if self.config.renormalize:
            self.renormalize_()

    @torch.no_grad()
    def renormalize_(self) -> None:
        """Bring the rows that learn back to the mean length of the base's rows. Where nobody calls it after a step:

        optimizer.register_step_post_hook(lambda *_: memory.renormalize_())
        """
        for side, rows in self.rows.sides().items():
            for row in rows.values():
                if row.requires_grad:
                    row.copy_(self.base[side].as_long(row))

    def add_to_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give `tokenizer`, in place, a special token `<|name|>` with the right id for each procedure. Save it beside
        the memory: `tokenizer.save_pretrained(folder)`.

        Raises:
            ValueError: it has no room for them, or such a token already; it is then as it was.
        """
        add_to_tokenizer(tokenizer, self.first_id, self.config.names)

    def check_size(self, embedding: nn.Module) -> None:
        """Raise ValueError where the embedding was resized, so that ids of procedures are now the base's."""
        n_rows = embedding.weight.shape[0]
        if n_rows != self.first_id:
            raise ValueError(
                f"the model's embedding had {self.first_id} rows when the task tokens were attached and has {n_rows} now, so "
                "that their ids are taken. Resize with model.resize_token_embeddings, which moves them, or export the "
                "procedures, detach, change the embedding, attach and add_exported"
            )

    def check_ids(self, ids: torch.Tensor) -> None:
        """Raise ValueError where `ids` (...) int64 has one of a free place or one past the last."""
        known = torch.tensor([self.first_id + int(place) for place in self.rows.input], device=ids.device)
        stray = ids[(ids >= self.first_id) & ~torch.isin(ids, known)]
        if stray.numel():
            present = {name: self.id_of(name) for name in self.names}
            raise ValueError(
                f"input_ids: {stray[0].item()} is the id of no procedure, it was removed or never there; "
                f"present: {present or 'none'}"
            )

    def _place(self, name: str) -> int:
        if name is None or name not in self.config.names:
            raise KeyError(
                f"no procedure named {name!r}, it was removed or never there; present: {self.names or 'none'}"
            )
        return self.config.names.index(name)

    def _put(self, name: str, rows: dict[str, nn.Parameter]) -> int:
        if name in self.names:
            raise ValueError(f"there is a procedure named {name!r}; remove it first, or choose another name")
        names, train = list(self.config.names), self.config.train
        place = names.index(None) if None in names else len(names)
        names[place : place + 1] = [name]
        self._set(names=names, train=None if train is None else [*train, name])
        self.rows.put(place, rows)
        return self.first_id + place

    def _base_tokens(self, text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
        """Tokens of a text that have a row in the base."""
        unknown = tokenizer.unk_token_id
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not (ids := [i for i in ids if i < self.first_id and i != unknown]):
            raise ConfigError(f"{where}: {text!r} has no token of the base")
        return ids

    def _new_rows(self, ids: list[int] | None = None) -> dict[str, nn.Parameter]:
        return {side: self.base[side].new(ids) for side in self.rows.sides()}

    def _set(self, **fields) -> None:
        """Put another config: configs are frozen, and one that was given is left as it is."""
        self.config = TaskTokensConfig(**{**self.config.model_dump(), **fields})


def task_tokens(model: nn.Module) -> dict[str, TaskTokens]:
    """The task tokens of a model by name: none or one."""
    return {name: m for name, m in memories(model).items() if isinstance(m, TaskTokens)}
