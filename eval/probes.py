"""Asking a model: how it gets a context (the conditions), and how its answer is read. Greedy, in batches.

| condition | what the model has when it is asked |
|---|---|
| full_context | context and question in one call, all of it in attention |
| sliding_window | the same call, in a model whose attention reaches a window: the rest arrives through memory |
| memory_only | the context was written to memory, its keys and values dropped; the question is asked of the state |
| closed_book | the question alone, of a model that learned the answer before |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig

import memlayers as ml
from memlayers.core.model import max_positions
from memlayers.tasks import Question, Sample

CONDITIONS = {
    "full_context": "all in attention",
    "sliding_window": "one stream, attention limited to the window",
    "memory_only": "written to memory, keys and values dropped, then asked",
}
STATE_CONTROLS = ("shuffled_memory", "zeroed_memory")


class Prober:
    """Asks one model the questions of samples; answers are texts, a list a haystack, from `model.generate`.

    Args:
        model: a causal LM, wrapped or plain; put into eval mode.
        tokenizer: to read predictions back.
        batch_size: rows of a batch.
        margin: tokens generated past the answer's length.
        advance: called with the number of answers given.

    Attributes:
        state_bytes: of one row of the state that was written last.
    """

    def __init__(
        self,
        model,
        tokenizer,
        batch_size: int = 32,
        margin: int = 4,
        advance: Callable[[int], object] | None = None,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.margin = batch_size, margin
        self.advance = advance or (lambda n: None)
        self.device = model.get_input_embeddings().weight.device
        self.positions, self.state_bytes = max_positions(model), 0
        eos = model.generation_config.eos_token_id
        first_eos = eos[0] if isinstance(eos, list) else eos
        self.pad = next(i for i in (tokenizer.pad_token_id, first_eos, 0) if i is not None)
        self.eos = eos

    def in_one_call(
        self, samples: Sequence[Sample], last: int | None = None, n_answer: int | None = None
    ) -> list[list[str]]:
        """Context and question as one input: full_context, and sliding_window in a wrapped model.

        last: keep only the last so many tokens of context and question (the truncated arms). n_answer: tokens to
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

    def question_only(self, samples: Sequence[Sample]) -> list:
        """The questions without any context: what the model says out of itself."""
        return self.in_one_call([Sample([], s.questions, s.depths, s.group, s.length) for s in samples])

    def from_memory(self, samples: Sequence[Sample], changes: Sequence[str | None] = (None,)) -> list[list]:
        """memory_only. Each context is written once; every question is asked of a copy of its state.

        changes: what to do to the states before asking: None, "shuffled_memory" (the state of the next
        haystack) or "zeroed_memory". Returns the predictions for each change. Raises `ValueError` for
        "shuffled_memory" with a single haystack.
        """
        if "shuffled_memory" in changes and len(samples) < 2:
            raise ValueError("shuffled_memory needs at least two haystacks.")
        answers: list[list] = [[] for _ in changes]
        for part in even_parts(samples, self.batch_size):
            ids, mask = self.pad_left([sample.context for sample in part])
            state = ml.write(self.model, ids, attention_mask=mask)
            self.state_bytes = state.nbytes // len(part)
            for out, change in zip(answers, changes):
                out += self._of_state(changed(state, change), part)
        return answers

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

    def _of_state(self, state: ml.MemoryState, samples: Sequence[Sample]) -> list:
        return _by_haystack(self.of_state(state, samples), samples)

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


class TokenProber(Prober):
    """Asks for the most likely token at each `answer_at` of each sample's one question; answers are lists of tokens.

    The question is read with its answers in it (teacher forcing): a token is predicted from the true ones before it.
    A row is read once, and all its answers are taken from that call.
    """

    def in_one_call(
        self, samples: Sequence[Sample], last: int | None = None, n_answer=None
    ) -> list[list[int]]:
        """Context and question as one input.

        last: each answer is predicted from no more than the last so many tokens before it, a row of its own.
        """
        rows = [sample.context + sample.questions[0].ids for sample in samples]
        places = [[len(sample.context) + at for at in sample.questions[0].answer_at] for sample in samples]
        if last is None:
            return self._in_batches(rows, places)
        cut = [row[max(0, at - last) : at] for row, each in zip(rows, places) for at in each]
        predictions = iter(self._in_batches(cut, [[len(row)] for row in cut]))
        return [[next(predictions)[0] for _ in each] for each in places]

    def _of_state(self, state: ml.MemoryState, samples: Sequence[Sample]) -> list[list[int]]:
        rows = [sample.questions[0].ids for sample in samples]
        return self._predict(rows, [sample.questions[0].answer_at for sample in samples], memory_state=state)

    def _in_batches(self, rows: list[list[int]], places: list[list[int]]) -> list[list[int]]:
        predictions: list[list[int]] = []
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            predictions += self._predict(rows[part], places[part])
        return predictions

    @torch.no_grad()
    def _predict(
        self, rows: Sequence[list[int]], places: Sequence[Sequence[int]], **state
    ) -> list[list[int]]:
        """The most likely token at each place of each row; one past its end is a place too, the first is none."""
        ids, mask = self.pad_left(rows)
        width = ids.shape[1]
        columns = [[width - len(row) + at - 1 for at in each] for row, each in zip(rows, places)]
        first = min(itertools.chain(*columns))
        logits = self.model(
            input_ids=ids, attention_mask=mask, logits_to_keep=width - first, use_cache=False, **state
        ).logits
        tokens = logits.argmax(-1).tolist()
        self.advance(sum(map(len, places)))
        return [[row[at - first] for at in each] for row, each in zip(tokens, columns)]


def changed(state: ml.MemoryState, change: str | None) -> ml.MemoryState:
    """The state after a control's change, see `Prober.from_memory`."""
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


def _by_haystack(texts: list[str], samples: Sequence[Sample]) -> list[list[str]]:
    grouped, at = [], 0
    for sample in samples:
        grouped.append(texts[at : at + len(sample.questions)])
        at += len(sample.questions)
    return grouped


@torch.no_grad()
def token_losses(model, ids: torch.Tensor, **state) -> torch.Tensor:
    """(rows, tokens - 1): negative log-likelihood in nats of the tokens of `ids` (rows, tokens) but the first."""
    logits = model(input_ids=ids, use_cache=False, **state).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
