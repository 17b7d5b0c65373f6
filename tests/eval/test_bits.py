"""Bits that a memory has room for: what is trained and what is counted, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.bits import MEMORY, Kept, evaluate, one_text
from memlayers.eval.bits_config import BitsConfig, Ladder
from memlayers.eval.bits_report import best_of
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "eval" / "bits.yaml"
LADDERS = load_yaml(YAML, [], BitsConfig).kinds


def ladder(name: str, **changes) -> Ladder:
    """That of the committed config, on layers that the tiny model has."""
    found = LADDERS[name]
    memory = found.memory.model_dump()
    if name == "neural":
        memory["layers"] = [0, 1]
    if name in ("memory tokens", "associative"):
        memory["segment_length"] = 64
    return Ladder(**{**found.model_dump(), "memory": memory, **changes})


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 300, (1, length + 1))


@pytest.mark.parametrize("name", LADDERS)
def test_what_is_kept_and_only_that_is_trained(tiny_llama, name):
    tiny_llama.requires_grad_(False)
    each = ladder(name)
    size, some = each.sizes[1], text(12)
    ml.attach(tiny_llama, each.of_size(size, 12), name=MEMORY)
    kept = Kept(tiny_llama, some, reads_back=each.read_back is not None)
    before = {name: x.clone() for name, x in tiny_llama.state_dict().items()}
    kept.loss(tiny_llama, some)[0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept.tensors)
    torch.optim.SGD(kept.tensors, lr=1.0).step()
    changed = {n for n, x in tiny_llama.state_dict().items() if not torch.equal(x, before[n])}
    own = {n for n, x in tiny_llama.named_parameters() if any(x is tensor for tensor in kept.tensors)}
    assert changed == own  # nothing but parameters that are kept: none where the memory has a state
    hidden = tiny_llama.config.hidden_size
    rows = {"memory tokens": size, "task tokens": size, "product keys": size**2}
    rows |= {name: size for name in LADDERS if name.startswith("reversible")}
    if name in rows:
        assert sum(tensor.numel() for tensor in kept.tensors) == rows[name] * hidden
    assert kept.nbytes >= sum(tensor.nbytes for tensor in kept.tensors)


def test_counts_are_those_of_the_model(tiny_llama):
    ml.attach(tiny_llama, ladder("memory tokens").of_size(4, 10), name=MEMORY)
    some = text(10)
    kept = Kept(tiny_llama, some)
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
    lora = Ladder(memory=lora, field="r", sizes=[4], learning_rate=3e-2)
    found = one_text(tiny_llama, lora, 4, text(12), text(12), steps=60, seed=1, learned=text(100)[0])
    assert found["recalled"] >= 10 and found["other_text"] <= 2
    widths = sum(sum(m.weight.shape) for n, m in tiny_llama.named_modules() if n.endswith("_proj"))
    assert found["bytes"] >= 4 * 4 * widths
    assert not ml.memories(tiny_llama)
    assert all(torch.equal(x, before[name]) for name, x in tiny_llama.state_dict().items())


def test_read_back_counts_what_the_memory_gives_back(tiny_llama):
    tiny_llama.requires_grad_(False)
    each = ladder("reversible, read back")
    memory, some = ml.attach(tiny_llama, each.of_size(4, 10), name=MEMORY), text(10)
    assert memory.schedule.reach == 12  # 4 tokens of 3 each: the text is one segment
    kept = Kept(tiny_llama, some, reads_back=True)
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
    each = ladder("reversible, read back", read_back={"steps": 60, "batch_size": 16, "learning_rate": 1e-2})
    found = one_text(tiny_llama, each, 4, *texts, steps=20, seed=1, learned=learned)
    assert found["recalled"] >= 7 and found["other_text"] <= 3
    assert not ml.memories(tiny_llama)


def test_the_most_bits_of_any_length_count():
    cells = [dict(name="a", size=1, length=n, bits=b, bytes=4) for n, b in [(4, 8.0), (8, 20.0), (16, 12.0)]]
    assert best_of({"cells": cells}, "a", 1)["length"] == 8
    assert best_of({"cells": cells}, "a", 1)["bits_a_byte"] == 5


def test_reports_and_a_finished_seed_is_not_measured_again(tiny_llama, tokenizer, tmp_path):
    base = tmp_path / "base"
    tiny_llama.save_pretrained(base)
    tokenizer.save_pretrained(base)
    kinds = {
        "memory tokens": {
            "memory": {"type": "tokens", "segment_length": 32},
            "field": "n_tokens",
            "sizes": [1, 2],
        }
    }
    kinds["memory tokens"]["lengths"] = [4, 8]
    config = BitsConfig(model=str(base), steps=2, kinds=kinds, seeds=[0, 1])
    first, second = evaluate(config, tmp_path / "out", progress=False)
    assert len(first["cells"]) == 4 and first["cells"] != second["cells"]
    for cell in first["cells"]:
        assert cell["bits"] == pytest.approx(cell["recalled"] * math.log2(first["alphabet"]))
    assert (tmp_path / "out" / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert "## memory tokens" in (tmp_path / "out" / "summary.md").read_text()
    (tmp_path / "out" / "seed1" / "report.json").unlink()
    changed = {**first, "wall_s": -1}
    (tmp_path / "out" / "seed0" / "report.json").write_text(json.dumps(changed))
    assert [r["wall_s"] < 0 for r in evaluate(config, tmp_path / "out", progress=False)] == [True, False]
    with pytest.raises(ValueError, match="give another folder"):
        evaluate(config.model_copy(update={"steps": 3, "seeds": [2]}), tmp_path / "out", progress=False)


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
