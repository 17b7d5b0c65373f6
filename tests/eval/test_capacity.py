"""Tokens that an adapter remembers: what is counted, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiments.capacity import CapacityConfig, one_text, read
from memlayers.eval.runner import evaluate
from memlayers.eval.texts import random_texts, tokens_of_words
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "eval" / "lora_capacity.yaml"
WRITER = {"steps": 40, "learning_rate": 0.03, "segment_length": 8}


def memory(r: int, **writer) -> ml.LoRAMemoryConfig:
    return ml.LoRAMemoryConfig(r=r, lora_alpha=2.0 * r, writer={**WRITER, **writer})


def drawn(tokenizer, length: int, seed: int) -> torch.Tensor:
    return random_texts(tokens_of_words(tokenizer), length, torch.Generator().manual_seed(seed))


def test_random_texts(tokenizer):
    alphabet = tokens_of_words(tokenizer)
    assert len(alphabet) > 20 and not set(alphabet) & set(tokenizer.all_special_ids)
    text, other = drawn(tokenizer, 200, seed=5)
    assert text.shape == other.shape == (1, 201) and not torch.equal(text, other)
    assert set(text[0].tolist()) | set(other[0].tolist()) <= set(alphabet)
    assert torch.equal(text, drawn(tokenizer, 200, seed=5)[0])
    assert not torch.equal(text, drawn(tokenizer, 200, seed=6)[0])


def test_reading_counts_every_token_but_the_first_in_its_segment(tiny_llama):
    ml.attach(tiny_llama, memory(2))
    text = torch.randint(3, 300, (1, 20))
    state = ml.write(tiny_llama, torch.randint(3, 300, (1, 20)))
    right, loss = read(tiny_llama, text, state, 8)
    expected, losses = [], []
    for start in (0, 8, 16):  # 19 tokens are predicted: 8, 8 and 3
        part = text[:, start : start + 9]
        logits = tiny_llama(part, past_key_values=state.to_cache()).logits[0, :-1].detach()
        expected += (logits.argmax(-1) == part[0, 1:]).tolist()
        losses.append(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none"))
    assert right == expected and len(right) == 19
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)  # sums in another order


def test_a_text_is_remembered_and_the_base_left_alone(tiny_llama, tokenizer):
    for part in (tiny_llama.lm_head, tiny_llama.model.embed_tokens):
        part.weight.data *= 20  # a random head is too small to be sure of anything
    before = {name: x.clone() for name, x in tiny_llama.state_dict().items()}
    found = one_text(tiny_llama, memory(4), *drawn(tokenizer, 32, seed=1), seed=1)
    widths = sum(sum(m.weight.shape) for n, m in tiny_llama.named_modules() if n.endswith("_proj"))
    assert found["parameters"] == 4 * widths
    right = {arm: sum(right) for arm, (right, _) in found["arms"].items()}
    assert right["adapter"] - right["base"] > 24 and right["other text"] < 8  # of 32
    assert len(found["arms"]["adapter"][0]) == 32
    assert found["arms"]["adapter"][1] < 1 < found["arms"]["base"][1]
    after = tiny_llama.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_every_file(tiny_llama, tokenizer, tmp_path):
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "base")
    config = CapacityConfig(
        model=str(tmp_path / "base"), ranks=[1, 3], lengths=[6, 12], memory=memory(2, steps=2), seeds=[0, 7]
    )
    results = evaluate(config, tmp_path / "out", progress=False)
    made = [r for r in results.records if "remembered" in r]
    assert [(r["seed"], r["rank"], r["length"]) for r in made] == [
        (s, r, n) for s in (0, 7) for r in (1, 3) for n in (6, 12)
    ]
    assert made[2]["parameters"] == 3 * made[0]["parameters"]
    for record in made:
        assert record["share"] == record["remembered"] / record["length"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "seeds 0, 7" in text and "## 12 tokens" in text


def test_every_rank_has_the_same_scaling():
    config = CapacityConfig(model="x", memory=ml.LoRAMemoryConfig(r=4, lora_alpha=6.0))
    assert [config.of_rank(r).lora_alpha / config.of_rank(r).r for r in (1, 4, 64)] == [1.5] * 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ranks=[1,0]", "ranks.1"),
        ("ranks=[2,2]", "ranks: .* names a value twice"),
        ("lengths=[]", "lengths"),
        ("memory.writer.steps=-1", "memory.writer.steps"),
        ("memory.rank=1", "memory.rank"),
    ],
)
def test_bad_fields(override, said):
    with pytest.raises(ConfigError, match=said):
        load_yaml(YAML, [override], CapacityConfig)


def test_the_committed_config():
    config = load_yaml(YAML, [], CapacityConfig)
    assert config.ranks == [1, 2, 4, 8, 16, 32, 64] and len(config.seeds) == 3
