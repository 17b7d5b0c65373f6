"""The regimes for answers that are single tokens: a row is read once, and all its answers are taken from that call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

import memlayers as ml
from memlayers.eval.regimes import Asker, changed, even_parts
from memlayers.tasks import Sample

TokenPredictions = list[list[int]]  # one list a sample, one token an answer


class TokenAsker:
    """Asks a model for the most likely token at each `answer_at` of each sample's one question.

    The question is read with its answers in it (teacher forcing): a token is predicted from the true ones before it.
    The methods are those of `Asker`, so that one plan serves both.

    asker: of the same model; gives batch size, padding, device and progress, which counts answers.
    """

    def __init__(self, asker: Asker) -> None:
        self.asker, self.model = asker, asker.model

    def in_one_call(self, samples: Sequence[Sample], last: int | None = None) -> TokenPredictions:
        """Context and question as one input: regime F, and W in a wrapped model.

        last: each answer is predicted from no more than the last so many tokens before it, a row of its own.
        """
        rows = [sample.context + sample.questions[0].ids for sample in samples]
        places = [[len(sample.context) + at for at in sample.questions[0].answer_at] for sample in samples]
        if last is None:
            return self._in_batches(rows, places)
        cut = [row[max(0, at - last) : at] for row, each in zip(rows, places) for at in each]
        said = iter(self._in_batches(cut, [[len(row)] for row in cut]))
        return [[next(said)[0] for _ in each] for each in places]

    def question_only(self, samples: Sequence[Sample]) -> TokenPredictions:
        """The questions without any context."""
        return self.in_one_call([Sample([], s.questions, s.depths, s.group, s.length) for s in samples])

    def from_memory(
        self, samples: Sequence[Sample], changes: Sequence[str | None] = (None,)
    ) -> list[TokenPredictions]:
        """Regime D: each context is written once, then its question is read on the state alone.

        changes, errors: as in `Asker.from_memory`.
        """
        if "shuffled_memory" in changes and len(samples) < 2:
            raise ValueError("shuffled_memory needs at least two haystacks.")
        said: list[TokenPredictions] = [[] for _ in changes]
        for part in even_parts(samples, self.asker.batch_size):
            ids, mask = self.asker.pad_left([sample.context for sample in part])
            state = ml.write(self.model, ids, attention_mask=mask)
            rows = [sample.questions[0].ids for sample in part]
            places = [sample.questions[0].answer_at for sample in part]
            for out, change in zip(said, changes):
                out += self._predict(rows, places, memory_state=changed(state, change))
        return said

    def _in_batches(self, rows: list[list[int]], places: list[list[int]]) -> TokenPredictions:
        said: TokenPredictions = []
        for start in range(0, len(rows), self.asker.batch_size):
            part = slice(start, start + self.asker.batch_size)
            said += self._predict(rows[part], places[part])
        return said

    @torch.no_grad()
    def _predict(
        self, rows: Sequence[list[int]], places: Sequence[Sequence[int]], **state
    ) -> TokenPredictions:
        """The most likely token at each place of each row; one past its end is a place too, the first is none."""
        ids, mask = self.asker.pad_left(rows)
        width = ids.shape[1]
        columns = [[width - len(row) + at - 1 for at in each] for row, each in zip(rows, places)]
        first = min(itertools.chain(*columns))
        logits = self.model(
            input_ids=ids, attention_mask=mask, logits_to_keep=width - first, use_cache=False, **state
        ).logits
        tokens = logits.argmax(-1).tolist()
        self.asker.advance(sum(map(len, places)))
        return [[row[at - first] for at in each] for row, each in zip(tokens, columns)]
