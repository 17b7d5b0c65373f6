"""Fictional documents for a bank, and questions about them without any context (closed book).

A document is about one subject: every fact of it is stated in all prompts of `trained`, the sentences in an order of their
own. Strangers are subjects of no document, asked the same way: what is answered about them is false recall.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memlayers.tasks import Fact, FactsConfig, FactsTask, Question
from memlayers.tasks.facts import STOP

PROMPTS = ("trained", "held_out")


@dataclass(frozen=True)
class Probe:
    """One prompt about one fact.

    document: id of the document about its subject, or of a stranger. prompts: trained or held_out. text: the prompt, as the
    router gets it. question: the prompt as tokens, BOS first where the tokenizer adds one.
    """

    document: str
    prompts: str
    fact: Fact
    text: str
    question: Question


class Documents:
    """`n` documents of `facts_per_document` facts, and questions; the same for the same seed and tokenizer.

    Attributes: `texts`: document -> text. `questions`: about the documents, all prompts of all facts. `strangers`: held-out
    prompts about as many subjects of none. `chance`: share that a guess among a relation's objects gets right.
    Raises `ValueError` when the tokenizer cannot spell the facts.
    """

    def __init__(self, tokenizer, n: int, facts_per_document: int, seed: int) -> None:
        size = n * facts_per_document
        facts = FactsConfig(
            n_facts=size, n_later=0, n_neighbours=size, facts_per_subject=facts_per_document, seed=seed
        )
        self.task = FactsTask(facts, tokenizer)
        self.chance = self.task.chance
        about = _by_subject("document", self.task.first, facts_per_document)
        self.texts = {document: self._text(document, own, seed) for document, own in about.items()}
        self.questions = self._questions(about, PROMPTS)
        strangers = _by_subject("stranger", self.task.neighbours, facts_per_document)
        self.strangers = self._questions(strangers, ("held_out",))

    def _text(self, document: str, facts: Sequence[Fact], seed: int) -> str:
        sentences = [
            f"{prompt.format(subject=fact.subject)} {fact.object}{STOP}"
            for fact in facts
            for prompt in self.task.templates(fact.relation, "trained")
        ]
        random.Random(f"memlayers:documents:{seed}:{document}").shuffle(sentences)
        return " ".join(sentences)

    def _questions(self, about: dict[str, list[Fact]], kinds: Sequence[str]) -> list[Probe]:
        asked = []
        for document, facts in about.items():
            for prompts in kinds:
                for fact, questions in zip(facts, self.task.questions(facts, prompts)):
                    texts = [
                        t.format(subject=fact.subject) for t in self.task.templates(fact.relation, prompts)
                    ]
                    for text, question in zip(texts, questions):
                        whole = replace(question, ids=self.task.bos + question.ids)
                        asked.append(Probe(document, prompts, fact, text, whole))
        return asked


def _by_subject(kind: str, facts: Sequence[Fact], size: int) -> dict[str, list[Fact]]:
    parts = [list(facts[start : start + size]) for start in range(0, len(facts), size)]
    return {f"{kind}-{number:03}": part for number, part in enumerate(parts)}
