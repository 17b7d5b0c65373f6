"""Three scripted responders: one knows the answer, one knows nothing, one knows what is stale. Every experiment must tell them
apart, at 1, at chance and as stale; and the report warns of a memory that leaks."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memlayers as ml
from memlayers.eval.experiments import bank, bits, capacity, cartridge, finetuned, procedures, reversible
from memlayers.eval.probes import Prober, TokenProber
from memlayers.eval.registry import EXPERIMENTS
from memlayers.eval.runner import evaluate, evaluate_model
from memlayers.tasks.procedures import ProceduresConfig, ProceduresTask
from memlayers.tasks.words import NOISE_SENTENCES

KNOWS, NOTHING, STALE = RESPONDERS = ("knows", "nothing", "stale")
MEMORY = "memory_only"


def texts_of(responder: str, samples) -> list[str]:
    """What a responder says to each question of each sample: the answers, nothing, or those of the next sample."""
    found = []
    for number, sample in enumerate(samples):
        another = samples[(number + 1) % len(samples)]
        for question, other in zip(sample.questions, another.questions):
            answers = {KNOWS: question.answers, STALE: other.answers, NOTHING: ("no idea",)}[responder]
            found.append(f" {' '.join(answers)}.")
    return found


@pytest.fixture
def scripted(monkeypatch):
    """Makes every prober answer as a responder, whatever the model."""

    def script(responder: str) -> None:
        monkeypatch.setattr(Prober, "of_state", lambda self, state, samples: texts_of(responder, samples))
        monkeypatch.setattr(
            Prober,
            "in_one_call",
            lambda self, samples, last=None, n_answer=None: [[t] for t in texts_of(responder, samples)],
        )

    return script


@pytest.fixture
def wrapped(tiny_llama):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=2, segment_length=40), name="stream")
    return tiny_llama


@pytest.fixture
def base(tiny_llama, tokenizer, tmp_path) -> str:
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def prose(tmp_path) -> str:
    (tmp_path / "prose.txt").write_text(" ".join(NOISE_SENTENCES * 8), encoding="utf-8")
    return str(tmp_path / "prose.txt")


@pytest.mark.parametrize("responder", RESPONDERS)
@pytest.mark.parametrize("task", ["passkey", "needle", "updates"])
def test_recall(wrapped, tokenizer, scripted, task, responder):
    scripted(responder)
    block = {"type": task, **({"statement_length": 32} if task == "updates" else {})}
    suites = {"s": {"task": block, "lengths": [128], "n": 6, "conditions": [MEMORY]}}
    results = evaluate_model(wrapped, tokenizer, suites=suites, arms=["trained"], controls=[], resamples=100)
    right = results.cell(arm="trained", length=128)["value"]
    stale = results.cell(condition=MEMORY, length=128, metric="stale")["value"]
    assert right == 1 if responder == KNOWS else right < 0.4  # the next history can end on the same object
    assert stale > 0.6 if responder == STALE else stale == 0


@pytest.mark.parametrize("responder", RESPONDERS)
def test_facts(wrapped, tokenizer, monkeypatch, responder):
    from memlayers.eval.experiments import facts

    def answers(prober, task, probes, places):
        another = facts._next_of_relation(list(dict.fromkeys(probe.fact for probe in probes)))
        says = {
            KNOWS: lambda probe: probe.fact.object,
            NOTHING: lambda probe: "none",
            STALE: lambda probe: another.get(probe.fact, probe.fact).object,
        }
        return [says[responder](probe) for probe in probes]

    monkeypatch.setattr(facts, "_answers", answers)
    fields = {"facts": {"n_facts": 20, "n_later": 0, "n_neighbours": 0}, "arms": ["trained"]}
    results = evaluate_model(wrapped, tokenizer, "facts", **fields)
    right, shuffled = (
        results.cell(measure=m, arm="trained")["value"] for m in ("efficacy", "shuffled_facts")
    )
    assert right == 1 if responder == KNOWS else right < 0.2
    assert shuffled > 0.8 if responder == STALE else shuffled < 0.2


@pytest.mark.parametrize("responder", RESPONDERS)
def test_pairs(wrapped, tokenizer, monkeypatch, responder):
    def answer(self, state, samples):
        rows = [[s.questions[0].ids[at] for at in s.questions[0].answer_at] for s in samples]
        return {KNOWS: rows, STALE: [*rows[1:], rows[0]], NOTHING: [[0] * len(row) for row in rows]}[
            responder
        ]

    monkeypatch.setattr(TokenProber, "_of_state", answer)
    fields = {
        "n_pairs": [4],
        "lengths": [40],
        "n": 8,
        "conditions": [MEMORY],
        "arms": ["trained"],
        "controls": [],
    }
    results = evaluate_model(wrapped, tokenizer, "pairs", task={"type": "mqar", "vocab_size": 300}, **fields)
    right, stale = (results.cell(n_pairs=4, metric=name)["value"] for name in ("accuracy", "stale"))
    assert right == 1 if responder == KNOWS else right < 0.1
    assert stale > 0.9 if responder == STALE else stale < 0.1


class Scripted(LlamaForCausalLM):
    """Is sure of the next token, of none, or of the one before."""

    responder = NOTHING

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, use_cache=False)
        shift = {KNOWS: -1, NOTHING: 0, STALE: 1}[self.responder]
        sure = torch.nn.functional.one_hot(input_ids.roll(shift, 1), output.logits.shape[-1]) * 30.0
        output.logits = sure * (self.responder != NOTHING)
        return output


@pytest.mark.parametrize("responder", RESPONDERS)
def test_perplexity(tiny_llama, tokenizer, prose, responder):
    model = Scripted(tiny_llama.config)
    model.responder = responder
    fields = {
        "prose": {"file": prose, "windows": 2, "n_sequences": 4},
        "window": 8,
        "arms": ["base", "trained"],
    }
    results = evaluate_model(model, tokenizer, "perplexity", base=model, **fields)
    found, vocabulary = results.cell(arm="trained", metric="perplexity")["value"], model.config.vocab_size
    assert {KNOWS: found < 1.01, NOTHING: found == pytest.approx(vocabulary), STALE: found > 10 * vocabulary}[
        responder
    ]


def sure_of(ids: torch.Tensor, vocabulary: int = 400) -> torch.Tensor:
    return torch.nn.functional.one_hot(ids, vocabulary) * 30.0


@pytest.mark.parametrize("responder", RESPONDERS)
def test_bits(base, monkeypatch, responder):
    init = bits.MemoryContents.__init__
    texts = {}

    def keep(self, model, text, reads_back=False):
        texts[KNOWS] = text[0, 1:]
        texts[NOTHING] = torch.zeros_like(texts[KNOWS])
        init(self, model, text, reads_back)

    drawn = bits.random_texts

    def draw(*args):
        texts["drawn"] = drawn(*args)
        return texts["drawn"]

    def predict(self, model, text):
        texts[STALE] = texts["drawn"][1][0, 1 : text.shape[1]]
        return sure_of(texts[responder])

    monkeypatch.setattr(bits, "random_texts", draw)
    monkeypatch.setattr(bits.MemoryContents, "__init__", keep)
    monkeypatch.setattr(bits.MemoryContents, "_predicted", predict)
    monkeypatch.setattr(bits.MemoryContents, "learn", lambda *args: None)
    sweep = {
        "memory": {"type": "tokens", "segment_length": 32},
        "field": "n_tokens",
        "sizes": [1],
        "lengths": [24],
    }
    config = bits.BitsConfig(model=base, kinds={"tokens": sweep}, seeds=[0])
    results = evaluate(config, f"{base}-out", progress=False)
    own, other = (
        next(r for r in results.records if r.get("text") == name)["recalled"] for name in ("own", "other")
    )
    assert {KNOWS: own == 24 > 4 > other, NOTHING: own == other == 0, STALE: own < 4 < other == 24}[responder]
    assert bool(results.report["warnings"]) == (responder == STALE)  # it is sure of a text that it never read


@pytest.mark.parametrize("responder", RESPONDERS)
def test_capacity(base, monkeypatch, responder):
    def read(model, text, state, segment_length):
        n = text.shape[1] - 1
        own = state is not None and read.number == 0
        read.number = (read.number + 1) % 3
        right = own if responder == KNOWS else state is not None and not own and responder == STALE
        return [right] * n, 0.0

    read.number = 0
    monkeypatch.setattr(capacity, "read", read)
    memory = ml.LoRAMemoryConfig(writer={"steps": 1, "learning_rate": 0.01, "segment_length": 8})
    config = capacity.CapacityConfig(model=base, ranks=[1], lengths=[12], memory=memory, seeds=[0])
    results = evaluate(config, f"{base}-out", progress=False)
    remembered = results.cell(rank=1, metric="remembered")["value"]
    other = results.cell(rank=1, arm="other text", metric="tokens right")["value"]
    assert (remembered, other) == {KNOWS: (12, 0), NOTHING: (0, 0), STALE: (0, 12)}[responder]
    assert bool(results.report["warnings"]) == (responder == STALE)


@pytest.mark.parametrize("responder", RESPONDERS)
def test_cartridge(base, monkeypatch, responder):
    def reading(model, before, asked):
        return torch.full((len(asked),), 3.0 if before.shape[1] == 1 else 1.0)

    loss = {KNOWS: 1.0, NOTHING: 3.0, STALE: 4.0}[responder]
    monkeypatch.setattr(cartridge, "after_reading", reading)
    monkeypatch.setattr(
        cartridge, "after_memory", lambda model, state, asked: torch.full((len(asked),), loss)
    )
    fields = {"text_length": 12, "continuation_length": 4, "sizes": [4], "seeds": [0], "writers": {}}
    config = cartridge.CartridgeEvalConfig(model=base, texts={"own": {"n": 2}}, **fields)
    results = evaluate(config, f"{base}-out", progress=False)
    kept = results.cell(arm="not refined", metric="kept")["value"]
    assert kept == {KNOWS: 1, NOTHING: 0, STALE: -0.5}[responder]


@pytest.mark.parametrize("responder", RESPONDERS)
def test_reversible(base, prose, monkeypatch, responder):
    def right(model, memory, segments, shift=0):
        said = {KNOWS: segments, NOTHING: torch.zeros_like(segments), STALE: segments.roll(1, 0)}[responder]
        return (said.roll(shift, 0) == segments).sum(1)

    monkeypatch.setattr(reversible, "right_tokens", right)
    arms = {"a": {"type": "reversible", "n_tokens": 2, "ratios": [3]}}
    config = reversible.ReversibleEvalConfig(
        model=base, file=prose, arms=arms, steps=1, batch_size=2, n_segments=9, seeds=[0]
    )
    results = evaluate(config, f"{base}-out", progress=False)
    found = results.cell(compressor="a", metric="tokens that come back")["value"]
    assert found == 1 if responder == KNOWS else found < 0.5
    assert (results.cell(compressor="a", metric="whole segments")["value"] == 1) == (responder == KNOWS)


@pytest.mark.parametrize("responder", RESPONDERS)
def test_bank(base, scripted, responder):
    scripted(responder)
    fields = {"n_documents": 3, "facts_per_document": 1, "n_deleted": 1, "top_k": [1], "seeds": [0]}
    config = bank.BankEvalConfig(model=base, bank=ml.LoRABankConfig(steps=1, segment_length=24), **fields)
    results = evaluate(config, f"{base}-out", progress=False)
    right = results.cell(arm="own shard", prompts="trained")["value"]
    assert (
        right == 1 if responder == KNOWS else right < 0.8
    )  # prompts of one length: the next is often of the same fact
    assert (right == 0) == (responder == NOTHING)
    if responder != STALE:  # scripted, the base and another's shard know too: that is a leak
        assert bool(results.report["warnings"]) == (responder == KNOWS)


@pytest.mark.parametrize("responder", RESPONDERS)
def test_procedures(tmp_path, monkeypatch, responder):
    known = ProceduresConfig(
        n_compositions=8, n_compounds=5, n_names=9, n_known=6, n_orders=4, n_maps=4, n_name_words=5
    )
    task = ProceduresTask(known)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": task.tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(task.tokenizer), **sizes, **ends)).save_pretrained(
        tmp_path / "base"
    )
    task.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "procedures.json").write_text(json.dumps(known.model_dump()))

    def generate(self, model, prompts):
        uses = {}
        for number, procedure in enumerate(self.procedures):
            another = self.procedures[(number + 1) % len(self.procedures)]
            for symbols in self.queries[procedure.name]:
                for definition in (False, True):
                    use = self.task.use(procedure, symbols, definition)
                    stale = self.task.use(another, symbols, definition)
                    uses[tuple(use.prompt)] = {
                        KNOWS: [*use.words, *use.answer],
                        STALE: [*stale.words, *stale.answer],
                    }
        return [uses[tuple(prompt)].get(responder, [0]) for prompt in prompts]

    monkeypatch.setattr(procedures.ProceduresRun, "_generate", generate)
    small = {"batches": 1, "batch_procedures": 3, "steps": 1, "batch_size": 2, "queries": 4, "seeds": [0]}
    arms = {"lora": {"type": "lora", "r": 1, "says": "words"}}
    config = procedures.ProceduresEvalConfig(base=str(tmp_path / "base"), arms=arms, **small)
    results = evaluate(config, tmp_path / "out", progress=False)
    right, routed = (results.cell(arm="lora", metric=name)["value"] for name in ("accuracy", "routing"))
    assert right == 1 if responder == KNOWS else right < 0.4
    assert routed == 1 if responder == KNOWS else routed < 1


@pytest.mark.parametrize("responder", RESPONDERS)
def test_finetuned(base, prose, monkeypatch, responder):
    rng = random.Random(0)

    def answers(model, sample):
        tuned = getattr(model, "tuned", False)
        return {KNOWS: tuned, NOTHING: rng.random() < 0.1, STALE: False}[responder]

    def tune(model, sample, config):
        tuned = LlamaForCausalLM(model.config)
        tuned.tuned = True
        return tuned

    monkeypatch.setattr(finetuned, "answers", answers)
    monkeypatch.setattr(finetuned, "finetuned", tune)
    block = {"file": prose, "windows": 2, "n_sequences": 2}
    task = {"type": "updates", "statement_length": 32}
    fields = {"prose": block, "task": task, "n_statements": [1], "n": 6, "seeds": [0]}
    results = evaluate(finetuned.FinetunedConfig(model=base, **fields), f"{base}-out", progress=False)
    right = results.cell(arm="finetuned", n_statements=1)["value"]
    assert right == 1 if responder == KNOWS else right < 0.5


def test_every_experiment_has_its_responders():
    assert {f"test_{name}" for name in EXPERIMENTS} <= globals().keys()


class Leaky(LlamaForCausalLM):
    """Keeps the whole text that was last written in itself, outside of the state, and answers from it."""

    tokenizer, text = None, ""

    def generate(self, ids, **kwargs):
        found = re.findall(r"key is (\d{5})\.", self.text)
        keys = found[-len(ids) :] if len(found) >= len(ids) else ["unknown"] * len(ids)
        rows = [self.tokenizer.encode(f" {key}.", add_special_tokens=False)[:12] for key in keys]
        return torch.cat([ids, torch.tensor([row + [0] * (12 - len(row)) for row in rows])], dim=1)


def test_a_leaky_memory_is_flagged(tiny_llama, tokenizer, monkeypatch):
    """Whatever is done to its state (zeroed, exchanged), it answers: the controls show it, and the report says so."""
    model = Leaky(tiny_llama.config)
    model.tokenizer = tokenizer
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=40), name="stream")
    write = ml.write

    def leak(model, ids, **kwargs):
        model.text = " ".join(tokenizer.decode(row) for row in ids)
        return write(model, ids, **kwargs)

    monkeypatch.setattr(ml, "write", leak)
    suites = {"passkey": {"task": {"type": "passkey"}, "lengths": [128], "n": 6, "conditions": [MEMORY]}}
    results = evaluate_model(model, tokenizer, suites=suites, base=tiny_llama, arms=["trained"])
    assert results.cell(arm="trained", length=128)["value"] == 1.0
    warnings = " ".join(results.report["warnings"])
    assert "arm zeroed_memory" in warnings and "must not know the answer" in warnings
    assert "**Warning.**" in results.texts["report.md"]
