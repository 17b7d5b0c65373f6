"""Trained rows route: on a frozen base that knows passkeys, the model itself calls the procedure that a prompt asks for,
and goes on with it. A later one is trained beside them and changes no bit of theirs."""

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlayers as ml
from memlayers.core.model import base_parameters
from memlayers.tasks.passkey import PasskeyConfig, PasskeyTask

BASE = Path(ml.__file__).parent / "demo" / "base"
ASKS = {"recall": " tell me", "harbour": " look up", "rain": " who is it"}
SAYS = {"harbour": " A boat waits in the harbour.", "rain": " Rain falls on the old roof."}


class Prompts:
    """A text with a passkey and a request; the answer is the procedure's token and what it says."""

    def __init__(self, memory, tokenizer, split):
        self.memory, self.rng = memory, random.Random(split)
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.task = PasskeyTask(PasskeyConfig(), tokenizer, split)

    def draw(self, name):
        sample = self.task.sample(self.rng, 34)
        (question,) = sample.questions
        said = self.encode(SAYS[name]) if name in SAYS else [*question.ids, *question.answer_ids]
        return [*sample.context, *self.encode(ASKS[name])], [self.memory.id_of(name), *said]


def train(model, memory, tokenizer, names, steps):
    """AdamW with weight decay over all rows of the bank; each step 8 prompts a procedure."""
    prompts = Prompts(memory, tokenizer, "train")
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(steps):
        pairs = [prompts.draw(name) for name in names * 8]
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(pairs), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()


@torch.no_grad()
def score(model, memory, tokenizer, names, n=10):
    """Shares of prompts never trained on whose first token is the right procedure, and whose answer is right."""
    prompts, routed, right = Prompts(memory, tokenizer, "eval"), 0, 0
    for name in names * n:
        prompt, answer = prompts.draw(name)
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False
        )
        said = said[0, len(prompt) :].tolist()
        routed, right = routed + (said[0] == answer[0]), right + (said == answer)
    return routed / (n * len(names)), right / (n * len(names))


def test_two_procedures_route_and_a_third_leaves_them_as_they_are():
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE).eval()
    memory = ml.attach(model, ml.TaskTokensConfig(names=["recall", "harbour"]))
    known = ["recall", "harbour"]
    assert score(model, memory, tokenizer, known, n=2) == (0, 0)
    train(model, memory, tokenizer, known, steps=80)
    routed, right = score(model, memory, tokenizer, known)
    assert routed >= 0.8 and right >= 0.8, (routed, right)  # three seeds: 1.0 and 1.0 each

    before = {name: row.detach().clone() for name, row in memory.named_parameters()}
    base = {name: p.detach().clone() for name, p in base_parameters(model)}
    memory.add("rain", init_from=SAYS["rain"], tokenizer=tokenizer)
    memory.learn(["rain"])
    train(model, memory, tokenizer, ["rain", *known], steps=80)
    routed, right = score(model, memory, tokenizer, ["rain", *known], n=6)
    assert routed >= 0.8 and right >= 0.8, (routed, right)  # three seeds: 0.94 to 1.0
    now = dict(memory.named_parameters())
    assert now.keys() - before.keys() == {"rows.input.2"}
    assert all(torch.equal(now[name], row) for name, row in before.items())
    assert all(torch.equal(p, base[name]) for name, p in base_parameters(model))
