"""The regimes: how a model gets the context of an item, and how it is asked. Greedy, in batches.

F: context and question in one call, all of it in attention. W: the same call, in a model whose attention
reaches only a window, so that the rest arrives through memory. D: the context is written to memory, keys and
values are dropped, and each question is asked of a copy of the state. Answers always come from
`model.generate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig

import memlayers as ml
from memlayers.core.model import max_positions
from memlayers.tasks import Question, Sample

Predictions = list[list[str]]  # one list a haystack, one text a question


class Asker:
    """Asks one model the questions of samples.

    model: a causal LM, wrapped or plain; put into eval mode. tokenizer: to read predictions back. batch_size:
    rows of a batch. margin: tokens generated past the answer's length. advance: called with the number of
    answers given.
    """

    def __init__(
        self,
        model,
        tokenizer,
        batch_size: int = 32,
        margin: int = 4,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.margin = batch_size, margin
        self.advance = advance or (lambda n: None)
        self.device = model.get_input_embeddings().weight.device
        self.positions = max_positions(model)
        eos = model.generation_config.eos_token_id
        first_eos = eos[0] if isinstance(eos, list) else eos
        self.pad = next(i for i in (tokenizer.pad_token_id, first_eos, 0) if i is not None)
        self.eos = eos

    def in_one_call(
        self, samples: Sequence[Sample], last: int | None = None, n_answer: int | None = None
    ) -> Predictions:
        """Context and question as one input: regime F, and W in a wrapped model.

        last: keep only the last so many tokens of context and question (the cut arms). n_answer: tokens to
        generate, but for the margin, whatever the batch; default: those of its longest answer.
        """
        rows = [(sample, question) for sample in samples for question in sample.questions]
        texts = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            inputs = [
                (sample.context + question.ids)[-last if last else None :] for sample, question in batch
            ]
            texts += self._generate(inputs, [question for _, question in batch], n_answer=n_answer)
        return _by_haystack(texts, samples)

    def question_only(self, samples: Sequence[Sample]) -> Predictions:
        """The questions without any context: what the model says out of itself."""
        alone = [Sample([], s.questions, s.depths, s.group, s.length) for s in samples]
        return self.in_one_call(alone)

    def from_memory(
        self, samples: Sequence[Sample], changes: Sequence[str | None] = (None,)
    ) -> list[Predictions]:
        """Regime D. Each context is written once; every question is asked of a copy of its state.

        changes: what to do to the states before asking: None, "shuffled_memory" (the state of the next
        haystack) or "zeroed_memory". Returns the predictions for each change. Raises `ValueError` for
        "shuffled_memory" with a single haystack.
        """
        if "shuffled_memory" in changes and len(samples) < 2:
            raise ValueError("shuffled_memory needs at least two haystacks.")
        texts: list[list[str]] = [[] for _ in changes]
        for part in even_parts(samples, self.batch_size):
            ids, mask = self.pad_left([sample.context for sample in part])
            state = ml.write(self.model, ids, attention_mask=mask)
            for out, change in zip(texts, changes):
                out += self.of_state(changed(state, change), part)
        return [_by_haystack(out, samples) for out in texts]

    def of_state(self, state: ml.MemoryState, samples: Sequence[Sample]) -> list[str]:
        """Each question of each sample, asked of a copy of the sample's row of `state`; a text a question."""
        rows = [(row, question) for row, sample in enumerate(samples) for question in sample.questions]
        texts = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            cache = state.select([row for row, _ in batch]).to_cache()  # a copy: the state stays as it is
            questions = [question for _, question in batch]
            texts += self._generate([question.ids for question in questions], questions, cache)
        return texts

    @torch.no_grad()
    def _generate(
        self, inputs: list[list[int]], questions: list[Question], cache=None, n_answer: int | None = None
    ) -> list[str]:
        ids, mask = self.pad_left(inputs)
        n_answer = n_answer or max(len(question.answer_ids) for question in questions)
        n_new = n_answer + self.margin
        if self.positions is not None:  # the margin gives way where the positions end; the answer never does
            n_new = max(n_answer, min(n_new, self.positions - ids.shape[1]))
        settings = GenerationConfig(
            max_new_tokens=n_new, do_sample=False, num_beams=1, pad_token_id=self.pad, eos_token_id=self.eos
        )
        kwargs = {} if cache is None else {"past_key_values": cache}
        out = self.model.generate(ids, attention_mask=mask, generation_config=settings, **kwargs)
        self.advance(len(inputs))
        return [
            self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in out[:, ids.shape[1] :].tolist()
        ]

    def pad_left(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded ids and mask, (B, T) int64, on the model's device."""
        width = max(map(len, rows))
        ids = [[self.pad] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def changed(state: ml.MemoryState, change: str | None) -> ml.MemoryState:
    """The state after a control's change, see `Asker.from_memory`."""
    if change is None:
        return state
    if change == "shuffled_memory":
        return state.select([(row + 1) % state.batch_size for row in range(state.batch_size)])
    if change == "zeroed_memory":
        return state.zeros_like()
    raise ValueError(f"unknown change of a state: {change!r}.")


def even_parts(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Parts of at most `size` (but at least two) samples, as even as can be: none is left with one to swap with none."""
    count = -(-len(samples) // max(2, size))
    edges = [round(part * len(samples) / count) for part in range(count + 1)]
    return [samples[low:high] for low, high in itertools.pairwise(edges)]


def _by_haystack(texts: list[str], samples: Sequence[Sample]) -> Predictions:
    grouped, at = [], 0
    for sample in samples:
        grouped.append(texts[at : at + len(sample.questions)])
        at += len(sample.questions)
    return grouped
