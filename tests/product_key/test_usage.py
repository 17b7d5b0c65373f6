"""Usage of slots: counts against plain loops, figures against their definitions, padding, tracking, the picture."""

import math

import pytest
import torch
from matrix import TEXT, llama, pad, tokens
from PIL import Image
from scipy import stats

import memlayers as ml
from memlayers.core.usage import draw_usage, reads_of_tables, track_usage
from memlayers.product_key.usage import concentration


def memory(**fields):
    small = {"n_keys": 5, "heads": 3, "top_k": 2, "key_dim": 4}
    return ml.ProductKeyMemory(ml.ProductKeyMemoryConfig(**{**small, **fields}), 8)


def reads(rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(25, (rows, 7, 6), generator=generator), torch.rand(rows, 7, 6, generator=generator)


def test_counts_equal_a_plain_loop():
    usage, (indices, weights) = memory().new_counter(), reads()
    mask = torch.rand(4, 7) < 0.6
    usage.add(indices, weights, mask)
    usage.add(indices, weights)
    slots, sums, keys = torch.zeros(25), torch.zeros(25, dtype=torch.float64), torch.zeros(3, 2, 5)
    for row in range(4):
        for place in range(7):
            times = 1 + int(mask[row, place])
            for n in range(6):
                slot = int(indices[row, place, n])
                slots[slot] += times
                sums[slot] += times * weights[row, place, n].double()
                keys[n // 2, 0, slot // 5] += times
                keys[n // 2, 1, slot % 5] += times
    assert torch.equal(usage.reads.float(), slots) and torch.equal(usage.keys.float(), keys)
    torch.testing.assert_close(usage.weights, sums)
    usage.clear()
    assert not any(t.any() for t in usage.tensors().values())


def test_figures_equal_their_definitions():
    use = torch.rand(200, dtype=torch.float64).pow(3)
    got, share = concentration(use), (use / use.sum()).numpy()
    assert got["effective_slots"] == pytest.approx(math.exp(stats.entropy(share)))
    assert got["kl_from_uniform"] == pytest.approx(stats.entropy(share, [1 / 200] * 200))
    pairs = abs(use[:, None] - use[None]).mean() / (2 * use.mean())  # Gini as the mean absolute difference
    assert got["gini"] == pytest.approx(float(pairs))


def test_figures_at_their_limits():
    even, one = concentration(torch.ones(50)), concentration(torch.eye(50)[3])
    assert even["effective_slots"] == pytest.approx(50) and even["gini"] == pytest.approx(0, abs=1e-6)
    assert even["kl_from_uniform"] == pytest.approx(0, abs=1e-6)
    assert one["effective_slots"] == pytest.approx(1) and one["gini"] == pytest.approx(0.98)
    empty = memory().new_counter().summary()
    assert empty.pop("keys_dead") == 1.0 and set(empty.values()) == {0.0}


def test_weights_can_tell_another_story_than_reads():
    usage, (indices, weights) = memory().new_counter(), reads()
    weights = torch.where(indices == 3, weights, weights * 1e-3)
    usage.add(indices, weights)
    figures = usage.summary()
    assert figures["weighted_effective_slots"] < 5 < figures["effective_slots"]
    assert 0 < figures["slots_used"] <= 1 and figures["keys_dead"] < 1


def test_padding_does_not_count():
    model = llama("product_key").model()
    ids, mask = pad([tokens(1, TEXT, seed=1)[0], tokens(1, 3, seed=2)[0]], "left")
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with track_usage(model) as batch:
            model(ids, attention_mask=mask, position_ids=place)
        with track_usage(model) as alone:
            for row, length in ((0, TEXT), (1, 3)):
                model(ids[row : row + 1, -length:])
    assert set(batch) == {"facts.layers.0", "facts.layers.1"}
    for name, usage in batch.items():
        assert usage.reads.sum() == (TEXT + 3) * 8
        assert torch.equal(usage.reads, alone[name].reads) and torch.equal(usage.keys, alone[name].keys)
        torch.testing.assert_close(usage.weights, alone[name].weights, atol=1e-5, rtol=1e-4)


def test_decoding_counts_each_token_once():
    model, ids = llama("product_key").model(), tokens(1, 4)
    with track_usage(model) as usage:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert all(u.reads.sum() == (4 + 4) * 8 for u in usage.values())  # the last token is not fed back


def test_tracking_ends_and_leaves_nothing():
    model, ids = llama("product_key").model(), tokens(2, TEXT)
    hooks = len(model.get_decoder()._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="stop"), track_usage(model) as usage:
        model(ids)
        raise RuntimeError("stop")
    before = usage["facts.layers.0"].reads.clone()
    model(ids)
    assert before.any() and torch.equal(usage["facts.layers.0"].reads, before)
    assert len(model.get_decoder()._forward_pre_hooks) == hooks
    assert all(not layer.observers for layer in ml.memories(model)["facts"].layers.values())


def test_reads_of_a_shared_table_are_summed():
    for kind, expected in (("product_key", 1), ("product_key_gate", 1)):
        model = llama(kind).model()
        with track_usage(model) as usage:
            model(tokens(2, TEXT))
        tables = reads_of_tables(model, usage)
        assert len(tables) == expected and all(name in dict(model.named_parameters()) for name in tables)
        assert sum(int(t.sum()) for t in tables.values()) == sum(int(u.reads.sum()) for u in usage.values())


def test_the_picture_is_drawn(tmp_path):
    model = llama("product_key").model()
    with track_usage(model) as usage:
        model(tokens(4, TEXT))
    draw_usage(usage, tmp_path / "usage.png")
    with Image.open(tmp_path / "usage.png") as picture:
        assert picture.size == (1200, 504) and len(picture.convert("L").getcolors(256)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["usage.png"]
