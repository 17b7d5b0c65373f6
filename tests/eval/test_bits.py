"""Bits that a memory has room for: what is trained and what is counted, on a tiny random model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.experiments.bits import MEMORY, BitsConfig, MemoryContents, SizeSweep, one_text
from memlayers.eval.runner import evaluate
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "eval" / "bits.yaml"
SWEEPS = load_yaml(YAML, [], BitsConfig).kinds


def sweep(name: str, **changes) -> SizeSweep:
    """That of the committed config, on layers that the tiny model has."""
    found = SWEEPS[name]
    memory = found.memory.model_dump()
    if name == "neural":
        memory["layers"] = [0, 1]
    if name in ("memory tokens", "associative"):
        memory["segment_length"] = 64
    return SizeSweep(**{**found.model_dump(), "memory": memory, **changes})


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 300, (1, length + 1))


@pytest.mark.parametrize("name", SWEEPS)
def test_what_is_kept_and_only_that_is_trained(tiny_llama, name):
    tiny_llama.requires_grad_(False)
    each = sweep(name)
    size, some = each.sizes[1], text(12)
    ml.attach(tiny_llama, each.of_size(size, 12), name=MEMORY)
    kept = MemoryContents(tiny_llama, some, reads_back=each.read_back is not None)
    before = {name: x.clone() for name, x in tiny_llama.state_dict().items()}
    kept.loss(tiny_llama, some)[0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept.tensors)
    torch.optim.SGD(kept.tensors, lr=1.0).step()
    changed = {n for n, x in tiny_llama.state_dict().items() if not torch.equal(x, before[n])}
    own = {n for n, x in tiny_llama.named_parameters() if any(x is tensor for tensor in kept.tensors)}
    assert changed == own  # nothing but parameters that are kept: none where the memory has a state
    hidden = tiny_llama.config.hidden_size
    rows = {"memory tokens": size, "task tokens": size, "product keys": size**2}
    rows |= {name: size for name in SWEEPS if name.startswith("reversible")}
    if name in rows:
        assert sum(tensor.numel() for tensor in kept.tensors) == rows[name] * hidden
    assert kept.nbytes >= sum(tensor.nbytes for tensor in kept.tensors)


def test_counts_are_those_of_the_model(tiny_llama):
    ml.attach(tiny_llama, sweep("memory tokens").of_size(4, 10), name=MEMORY)
    some = text(10)
    kept = MemoryContents(tiny_llama, some)
    loss, right = kept.loss(tiny_llama, some)
    embeds = tiny_llama.get_input_embeddings()(some)
    (memory,) = kept.tensors
    with ml.disabled(tiny_llama):
        logits = tiny_llama(inputs_embeds=torch.cat([memory, embeds], dim=1)).logits[0, 4:-1]
    assert right == (logits.argmax(-1) == some[0, 1:]).sum()
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, some[0, 1:]).item(), rel=1e-5
    )


def test_a_text_is_recalled_and_another_is_not(tiny_llama):
    tiny_llama.requires_grad_(False)
    for part in (tiny_llama.lm_head, tiny_llama.model.embed_tokens):
        part.weight.data *= 20  # a random head is too small to be sure of anything
    before = {name: x.clone() for name, x in tiny_llama.state_dict().items()}
    lora = {"type": "lora", "lora_alpha": 8}
    lora = SizeSweep(memory=lora, field="r", sizes=[4], learning_rate=3e-2)
    found = one_text(tiny_llama, lora, 4, text(12), text(12), steps=60, seed=1, learned=text(100)[0])
    assert found["recalled"] >= 10 and found["other_text"] <= 2
    widths = sum(sum(m.weight.shape) for n, m in tiny_llama.named_modules() if n.endswith("_proj"))
    assert found["bytes"] >= 4 * 4 * widths
    assert not ml.memories(tiny_llama)
    assert all(torch.equal(x, before[name]) for name, x in tiny_llama.state_dict().items())


def test_read_back_counts_what_the_memory_gives_back(tiny_llama):
    tiny_llama.requires_grad_(False)
    each = sweep("reversible, read back")
    memory, some = ml.attach(tiny_llama, each.of_size(4, 10), name=MEMORY), text(10)
    assert memory.schedule.reach == 12  # 4 tokens of 3 each: the text is one segment
    kept = MemoryContents(tiny_llama, some, reads_back=True)
    said, mask = ml.read_back(tiny_llama, kept.state)
    assert mask.sum() == 10
    loss, right = kept.loss(tiny_llama, some)
    assert right == (said == some[:, 1:]).sum()
    optimizer = torch.optim.AdamW(kept.tensors, lr=1e-1)
    for _ in range(30):
        optimizer.zero_grad()
        kept.loss(tiny_llama, some)[0].backward()
        optimizer.step()
    assert kept.loss(tiny_llama, some)[0] < loss


def test_a_compressor_learns_other_texts_before_it_is_read_back(tiny_llama):
    tiny_llama.requires_grad_(False)
    draw = torch.Generator().manual_seed(3)
    alphabet = torch.arange(3, 20)
    texts = alphabet[torch.randint(len(alphabet), (2, 1, 9), generator=draw)]
    learned = alphabet[torch.randint(len(alphabet), (2000,), generator=draw)]
    each = sweep("reversible, read back", read_back={"steps": 60, "batch_size": 16, "learning_rate": 1e-2})
    found = one_text(tiny_llama, each, 4, *texts, steps=20, seed=1, learned=learned)
    assert found["recalled"] >= 7 and found["other_text"] <= 3
    assert not ml.memories(tiny_llama)


def small(tiny_llama, tokenizer, folder, **fields) -> BitsConfig:
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = {"memory": {"type": "tokens", "segment_length": 32}, "field": "n_tokens"}
    kinds = {"memory tokens": {**tokens, "sizes": [1, 2], "lengths": [4, 8]}}
    return BitsConfig(model=str(folder), **{"steps": 2, "kinds": kinds, "seeds": [0, 1], **fields})


def test_records_and_the_report(tiny_llama, tokenizer, tmp_path):
    results = evaluate(small(tiny_llama, tokenizer, tmp_path / "base"), tmp_path / "out", progress=False)
    own = [r for r in results.records if r.get("text") == "own"]
    assert {(r["seed"], r["size"], r["length"]) for r in own} == {
        (s, z, n) for s in (0, 1) for z in (1, 2) for n in (4, 8)
    }
    for record in (r for r in results.records if "bits" in r):
        same = [r["recalled"] for r in own if (r["seed"], r["size"]) == (record["seed"], record["size"])]
        assert record["bits"] == pytest.approx(max(same) * -math.log2(own[0]["chance"]))
        assert record["bits_per_byte"] == record["bits"] / record["bytes"]
    assert (tmp_path / "out" / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert "## memory tokens: tokens recalled" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [1, 1]}, "sizes.*names a value twice"),
        ({"lengths": [8, 8]}, "lengths.*names a value twice"),
        ({"field": "n_token"}, "n_token"),
        ({"sizes": [0]}, "sizes"),
        ({"read_back": {}}, "read_back: only a reversible memory"),
    ],
)
def test_errors_name_the_field(changes, message):
    from memlayers.config import validate

    block = {"memory": {"type": "tokens"}, "field": "n_tokens", "sizes": [1], **changes}
    with pytest.raises(ConfigError, match=message):
        validate(BitsConfig, {"model": "x", "kinds": {"memory tokens": block}})
