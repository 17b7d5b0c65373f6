"""Background: what the model says of other text stays what its base says of it.

In every step a batch of ordinary text runs too, and KL(base ‖ model), the mean over tokens of the text, is added to the
loss. The base is the same model with its memories off; where it learns too, a copy of what it was at the start.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.tasks import FactsTask

from .config import TrainConfig
from .data import Batch, Example, ExampleSource, collate
from .data_config import FactsData, TextData
from .sources import make_source


class Background:
    """The batches that are read beside those of the data, and what the base says of them.

    Attributes:
        weight: of the divergence in the loss.
        base: the model to stay near to; None where it is the trained one with its memories off.

    Raises:
        ConfigError: a file that is not there or too short; names the field.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, tokenizer):
        section = config.background
        self.weight, self.base = section.weight, None
        if config.train_what in ("memory_and_base", "memory_and_lora"):
            self.base = copy.deepcopy(model).requires_grad_(False).eval()
        text = TextData(files=section.files, length=section.length)
        changes = {"data": text, "batch_size": section.batch_size}
        try:
            self.texts = make_source(config.model_copy(update=changes), tokenizer, None)
        except ConfigError as error:
            raise ConfigError(str(error).replace("data.files", "background.files", 1)) from None
        self.others = None
        if section.neighbours:
            examples = neighbour_examples(model, config.data, tokenizer)
            self.others = ExampleSource(examples, "P", section.neighbours, config.seed, has_accuracy=False)

    def batch(self, position: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch that goes with the data's batch of the same place; all of it counts."""
        examples = self.texts.items(position, rank, world)
        if self.others is not None:
            examples = examples + self.others.items(position, rank, world)
        return collate(examples, "W")


@torch.no_grad()
def neighbour_examples(model: nn.Module, data: FactsData, tokenizer, batch_size: int = 100) -> list[Example]:
    """Prompts about subjects of no batch, the `spare` ones that evaluation does not ask for, and what the base says
    to them: greedy, as many tokens as the longest answer has."""
    task = FactsTask(data.facts, tokenizer)
    asked = [q for questions in task.questions(task.spare, "trained") for q in questions]
    prompts = sorted(([*task.bos, *question.ids] for question in asked), key=len)
    n_new, training = max(len(question.answer_ids) for question in asked), model.training
    model.eval()
    examples = []
    with ml.disabled(model):
        for start in range(0, len(prompts), batch_size):
            rows = collate([Example((), (), ids) for ids in prompts[start : start + batch_size]], "W")
            ids = rows.input_ids.to(model.device)
            mask = rows.parts.sign().to(model.device)
            said = model.generate(
                ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
            )
            for prompt, answer in zip(prompts[start : start + batch_size], said[:, ids.shape[1] :].tolist()):
                examples.append(Example((), (), [*prompt, *answer]))
    model.train(training)
    return examples


def divergence(model: nn.Module, batch: Batch, base: nn.Module | None = None) -> torch.Tensor:
    """KL(base ‖ model): the mean over the tokens of each row, then over the rows, a float32 scalar.

    base: a frozen model in eval mode; None: `model` with its memories off.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    training, base = model.training, model if base is None else base
    model.eval()  # the base without its dropout
    with torch.no_grad(), ml.disabled(base):
        expected = base(**inputs).logits.float().log_softmax(-1)
    model.train(training)
    # Less the tokens that memories add.
    ours = model(**inputs).logits.float().log_softmax(-1)[..., : expected.shape[-1]]
    each = F.kl_div(ours, expected, reduction="none", log_target=True).sum(-1)
    real = batch.parts > 0
    return ((each * real).sum(1) / real.sum(1)).mean()
