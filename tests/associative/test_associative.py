"""Associative memory: its two operations against loops over tokens, and what it holds."""

import pytest
import torch
from matrix import ARCHITECTURES, says, tokens

import memlayers as ml
from memlayers.associative import AssociativeLayer
from memlayers.associative.module import EPS, dpfp

WIDTH = 12


def layer(value: float = 1.0, **fields) -> AssociativeLayer:
    """A layer in float64, off its start."""
    torch.manual_seed(0)
    config = ml.AssociativeMemoryConfig(**{"key_dim": 5, "nu": 2, "n_tokens": 3, **fields})
    made = AssociativeLayer(config, WIDTH).double()
    torch.nn.init.normal_(made.value.weight, std=value)
    torch.nn.init.normal_(made.norm.weight, mean=1.0, std=0.3)
    return made


def state_of(made: AssociativeLayer, rows: int, n_written: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """What some random tokens wrote, in float64."""
    empty = tuple(x.double() for x in made.new_state(rows))
    return made.write(torch.randn(rows, n_written, WIDTH, dtype=torch.float64), *empty)


def test_dpfp_by_hand():
    x = torch.tensor([2.0, -3.0])  # r = [2, 0, 0, 3]
    assert dpfp(x, 1).tolist() == [2 * 3, 0, 0, 0]  # with [3, 2, 0, 0]
    assert dpfp(x, 3).tolist() == [
        6,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        6,
    ]  # [0, 3, 2, 0] and [0, 0, 3, 2] behind it


@pytest.mark.parametrize(("correction", "normalize"), [(True, True), (False, True), (True, False)])
def test_reading_and_writing_are_what_the_paper_says(correction, normalize):
    """Token by token, with nothing but vectors."""
    made = layer(correction=correction, normalize=normalize)
    matrix, normalizer = state_of(made, rows=2)
    assert (matrix.abs().amax((1, 2)) > 0.1).all()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    read, (new_matrix, new_normalizer) = made.read(x, matrix, normalizer), made.write(x, matrix, normalizer)
    for row in range(2):
        a, z = matrix[row].clone(), normalizer[row].clone()
        for i in range(3):
            m = x[row, i] / (x[row, i].square().mean() + 1e-6).sqrt() * made.norm.weight
            for got, projection in ((read[row, i], made.query), (None, made.key)):
                phi = dpfp(projection.weight @ m, 2)
                phi = phi / phi.norm()
                held = matrix[row].T @ phi / (normalizer[row] @ phi + EPS if normalize else 1)
                if got is not None:
                    torch.testing.assert_close(got, held, atol=1e-12, rtol=1e-10)
            beta = (made.beta.weight[0] @ m + made.beta.bias[0]).sigmoid()
            a += beta * torch.outer(phi, made.value.weight @ m - held)
            z += ((1 - normalizer[row] @ phi).clamp(0, 1) if correction else 1.0) * phi
        torch.testing.assert_close(new_matrix[row], a, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(new_normalizer[row], z, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(normalize):
    made = layer(normalize=normalize)
    matrix, normalizer = (x.detach().requires_grad_() for x in state_of(made, rows=1))
    written = torch.randn(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)

    def write_and_read(written, x, matrix, normalizer):
        return made.read(x, *made.write(written, matrix, normalizer))

    assert torch.autograd.gradcheck(write_and_read, (written, x, matrix, normalizer))


def test_what_was_written_is_read_and_overwritten():
    """With equal keys and queries and β near 1 a lone key gives its value back, and a second value replaces it."""
    made = layer()
    made.query.weight.data.copy_(made.key.weight)
    made.beta.bias.data.fill_(50.0)
    first, second = torch.randn(2, 1, 1, WIDTH, dtype=torch.float64)
    empty = tuple(x.double() for x in made.new_state(1))
    once = made.write(first, *empty)
    value = made.value(made._normed(first, first))
    torch.testing.assert_close(made.read(first, *once), value, rtol=1e-4, atol=1e-4)  # but for EPS
    made.value.weight.data.neg_()
    twice = made.write(first, *once)
    torch.testing.assert_close(made.read(first, *twice), -value, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made.read(second, *twice), -value)


def test_a_key_written_again_without_the_normalizer_reads_its_new_value_beside_other_keys():
    """The plain delta rule: exact whatever else is there, which with the normalizer it is not."""
    off = {}
    for normalize in (True, False):
        made = layer(normalize=normalize)
        made.query.weight.data.copy_(made.key.weight)
        made.beta.bias.data.fill_(50.0)
        state, again = state_of(made, rows=1), torch.randn(1, 1, WIDTH, dtype=torch.float64)
        value = made.value(made._normed(again, again))
        off[normalize] = (made.read(again, *made.write(again, *state)) - value).norm() / value.norm()
    assert off[False] < 1e-10
    assert off[True] > 0.01


def test_nothing_is_read_before_value_has_learned():
    """The start: bit-equal to a model whose attention ends with the segment, and `value` gets a gradient."""
    architecture, ids = ARCHITECTURES[0], tokens(2, 11)
    model = architecture.build().eval()
    config = {"n_tokens": 2, "segment_length": 5, "key_dim": 4}
    ml.attach(model, ml.AssociativeMemoryConfig(**config))
    logits = model(ids).logits
    cut = architecture.build().eval()
    for start in (0, 5, 10):
        part = ids[:, start : start + 5]
        torch.testing.assert_close(logits[:, start : start + 5], cut(part).logits, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    for name, parameter in ml.memory_parameters(model):
        if "value" in name:
            assert parameter.grad.abs().max() > 0, name


def test_bad_fields_are_named():
    for fields, parts in [
        ({"nu": 0}, ["nu:", "greater than or equal to 1"]),
        ({"key_dims": 4}, ["key_dims: unknown field", "did you mean 'key_dim'"]),
    ]:
        with pytest.raises(ml.ConfigError, match=says(*parts)):
            ml.AssociativeMemoryConfig(**fields)
    model = ARCHITECTURES[0].build()
    with pytest.raises(ml.ConfigError, match="layer 7 is out of range"):
        ml.attach(model, ml.AssociativeMemoryConfig(layers=[7], segment_length=8))
    with pytest.raises(ml.ConfigError, match="positions, the model has 96"):
        ml.attach(model, ml.AssociativeMemoryConfig(n_tokens=16, segment_length=90))


def test_a_state_of_another_memory_is_refused():
    states = []
    for key_dim in (4, 6):
        model = ARCHITECTURES[0].build().eval()
        ml.attach(
            model, ml.AssociativeMemoryConfig(n_tokens=2, segment_length=5, key_dim=key_dim), name="past"
        )
        states.append(ml.write(model, tokens(1, 7)))
    with pytest.raises(ValueError, match=says("'past'", "layers.0.matrix", "written by another memory")):
        model(tokens(1, 7), memory_state=states[0])
