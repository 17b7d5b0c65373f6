"""The reversible compressor: an exact inverse, gradients, levels, and what padding must not change."""

import math

import pytest
import torch
from matrix import says

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.reversible.module import Coupling, first_route, token_scores

WIDTH = 12


def compressor(**fields) -> ml.ReversibleCompressor:
    """In float64, with the weights shaken, so that no term of a coupling is small."""
    torch.manual_seed(0)
    config = ml.ReversibleMemoryConfig(**{"n_tokens": 2, "ratios": [3], "heads": 3, "depth": 3, **fields})
    made = ml.ReversibleCompressor(config, WIDTH).double()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def text(rows: int, made: ml.ReversibleCompressor, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = made.config.segment_length
    x = torch.randn(rows, size, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(size) < torch.tensor(lengths or [size] * rows)[:, None]


@pytest.mark.parametrize("lengths", [(), (6, 4, 1)])
def test_the_inverse_is_exact_when_nothing_is_dropped(lengths):
    made = compressor()
    level, (x, mask) = made.levels[0], text(3, made, *lengths)
    memory, rest = level.compress(x, mask)
    assert (memory - level.slots).abs().min() > 1e-6 and (rest - x).abs().max() > 0.1
    again, slots = level.restore(memory, mask, rest)
    torch.testing.assert_close(again, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(slots, level.slots.expand_as(slots), atol=1e-10, rtol=0)


def test_the_inverse_is_near_in_float32_whatever_the_weights_are_in():
    made = compressor(depth=6)
    x, mask = text(3, made)
    for dtype in (torch.float32, torch.bfloat16):
        level = made.to(dtype).levels[0]
        again, _ = level.restore(*_swapped(level.compress(x.float(), mask), mask))
        torch.testing.assert_close(again, x.float(), atol=1e-4, rtol=0)


def _swapped(parts, mask):
    memory, rest = parts
    return memory, mask, rest


def test_a_coupling_is_what_revnet_says():
    """y1 = x1 + attention(x2), y2 = x2 + mlp(y1), head by head and place by place."""
    torch.manual_seed(0)
    made = Coupling(8, 1, 3, heads=2, expansion=2).double()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, used = torch.randn(1, 4, 8, dtype=torch.float64), torch.tensor([[True, True, False, True]])
    x1, x2 = x[0, :, :4], x[0, :, 4:]

    def normed(norm, row):
        return row / (row.square().mean() + 1e-6).sqrt() * norm.weight

    seen = torch.stack([normed(made.norm_1, row) + place for row, place in zip(x2, made.places)])
    q, k, v = (seen @ made.qkv.weight.T).split(8, dim=-1)
    y1 = x1.clone()
    for place in range(4):
        read = []
        for head in range(2):
            of = slice(4 * head, 4 * head + 4)
            scores = torch.tensor(
                [(q[place, of] @ k[j, of] / 2 + made.route[head, place, j]).item() for j in (0, 1, 3)]
            )
            read.append(scores.double().softmax(0) @ v[[0, 1, 3], of])
        y1[place] += made.out.weight @ torch.cat(read)
    inner = [torch.nn.functional.gelu(made.up(normed(made.norm_2, row))) for row in y1]
    y2 = x2 + torch.stack([made.down.weight @ row for row in inner])
    torch.testing.assert_close(made(x, used)[0], torch.cat([y2, y1], -1), atol=1e-6, rtol=0)


def test_gradients_of_both_directions():
    made = compressor(depth=2, n_tokens=1, ratios=[2])
    x, mask = text(2, made, 2, 1)
    slots, route = made.levels[0].slots, made.levels[0].couplings[0].route

    def there_and_back(x, slots, route):
        return made.restore(made.compress(x, mask), mask)

    inputs = (x.requires_grad_(), slots, route)
    assert torch.autograd.gradcheck(there_and_back, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("backwards", ["inverse", "separate"])
def test_padding_and_rows_change_nothing(backwards):
    made = compressor(ratios=[3, 2], depth=2, backwards=backwards)
    x, mask = text(3, made, 12, 7, 2)
    memory = made.compress(x, mask)
    other = made.compress(torch.where(mask[..., None], x, torch.randn_like(x)), mask)
    torch.testing.assert_close(memory, other)
    torch.testing.assert_close(memory[1:2], made.compress(x[1:2], mask[1:2]))
    back = made.restore(memory, mask)
    torch.testing.assert_close(back[1:2], made.restore(memory[1:2], mask[1:2]))
    assert not torch.allclose(memory[0], memory[1])


def test_levels_are_single_compressors_one_after_the_other():
    made = compressor(ratios=[3, 2])
    x, mask = text(2, made)
    first, second = made.compress_by_level(x, mask)
    assert first.shape == (2, 4, WIDTH) and second.shape == (2, 2, WIDTH)
    for start in (0, 6):
        span, _ = made.levels[0].compress(x[:, start : start + 6], mask[:, :6])
        torch.testing.assert_close(first[:, start // 3 : start // 3 + 2], span)
    torch.testing.assert_close(made.levels[1].compress(first, mask[:, :4])[0], second)
    torch.testing.assert_close(made.compress(x, mask), second)
    lower, _ = made.levels[1].restore(second, mask[:, :4])
    torch.testing.assert_close(made.restore(second, mask), made.restore(lower, mask, level=0))


@pytest.mark.parametrize(("heads", "places"), [(2, [0, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 0, 1])])
def test_every_head_begins_at_a_place_of_the_slots_stretch(heads, places):
    route = first_route(2, 8, heads)
    assert torch.equal(route, route.transpose(1, 2)) and int((route > 0).sum()) == 4 * heads
    assert route[:, 1, 6:].argmax(1).tolist() == places and route[:, 1, :6].abs().max() == 0


def test_the_nearest_token_has_the_highest_score():
    x, table = torch.randn(5, WIDTH), 2 * torch.randn(9, WIDTH)
    distance = torch.cdist(x, table).square() / (2 * math.sqrt(WIDTH))
    torch.testing.assert_close(
        token_scores(x, table).log_softmax(-1), (-distance).log_softmax(-1), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ratios": []}, "ratios"),
        ({"ratios": [4, 0]}, "ratios.1"),
        ({"depth": 1}, "depth"),
        ({"depth": 3, "backwards": "separate"}, "depth: 3 couplings have no halves"),
        ({"backwards": "both"}, "backwards"),
        ({"segment_length": 32}, "segment_length: unknown field"),
    ],
)
def test_bad_fields(fields, said):
    with pytest.raises(ConfigError, match=says(said)):
        ml.ReversibleMemoryConfig(**fields)


@pytest.mark.parametrize(("heads", "width"), [(5, 12), (3, 9)])
def test_a_width_that_does_not_split(heads, width):
    with pytest.raises(ConfigError, match="heads"):
        ml.ReversibleCompressor(ml.ReversibleMemoryConfig(heads=heads), width)
