"""`ProductKeyMemory` on its own: against brute force over all slots, its fields, its start, its errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import memlayers as ml

HIDDEN = 12


def config(**fields):
    small = {"n_keys": 6, "heads": 3, "top_k": 4, "key_dim": 8, "value_dim": 10}
    return ml.ProductKeyMemoryConfig(**{**small, **fields})


def memory(dtype=torch.float64, seed=0, **fields):
    """A memory none of whose parameters is at a neutral value."""
    torch.manual_seed(seed)
    module = ml.ProductKeyMemory(config(**fields), HIDDEN).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def brute_force(module, x):
    """The formula read aloud: every head scores every slot, takes its best, and sums their values."""
    c, half, out = module.config, module.config.key_dim // 2, []
    for token in x.reshape(-1, HIDDEN):
        read = torch.zeros(module.value_dim, dtype=x.dtype)
        query = module.query(token).view(c.heads, 2, half)
        for head in range(c.heads):
            q, k = query[head], module.keys[head]
            if c.qk_norm:
                q = F.rms_norm(q, (half,), eps=1e-6) * module.query_norm[head]
                k = F.rms_norm(k, (half,), eps=1e-6) * module.key_norm[head][:, None]
            slots = [q[0] @ k[0, i] + q[1] @ k[1, j] for i, j in itertools.product(range(c.n_keys), repeat=2)]
            scores, indices = torch.stack(slots).topk(c.top_k)
            rules = {"softmax": lambda s: s.softmax(0), "sigmoid": torch.sigmoid, "relu": F.relu}
            read = read + rules[c.score](scores) @ module.values[indices]
        if c.gate == "silu":
            read = read * F.silu(module.gate(token))
        elif c.gate == "learned":
            read = read * torch.sigmoid(module.gate(token))
        out.append(module.value_proj(read) if c.value_proj else read)
    return torch.stack(out).view(*x.shape[:-1], -1)


VARIANTS = [
    {},
    {"score": "sigmoid", "gate": "learned"},
    {"score": "relu", "gate": "none", "qk_norm": False, "key_init": "normal"},
    {"value_proj": False, "value_dim": HIDDEN, "value_init": "zero"},
    {"heads": 1, "top_k": 6, "n_keys": 7, "key_dim": 2},
]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_it_equals_brute_force_with_gradients(fields, kernels):
    module, x = memory(**fields), torch.randn(2, 5, HIDDEN, dtype=torch.float64, requires_grad=True)
    module.kernels = kernels
    inputs = [x, *module.parameters()]
    got, expected = module(x), brute_force(module, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(got)
    for name, a, b in zip(
        ["x", *dict(module.named_parameters())],
        torch.autograd.grad((got * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
    ):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_gradcheck():
    module, x = (
        memory(n_keys=3, top_k=2, heads=2),
        torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True),
    )
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


@pytest.mark.parametrize(
    "shape", [(HIDDEN,), (1, HIDDEN), (0, HIDDEN), (2, 0, HIDDEN), (2, 3, 4, HIDDEN)], ids=str
)
def test_any_number_of_rows(shape):
    x = torch.randn(shape)
    assert memory(torch.float32)(x).shape == shape


def test_tokens_are_on_their_own():
    module, x = memory(torch.float32), torch.randn(3, 7, HIDDEN)
    whole = module(x)
    torch.testing.assert_close(
        whole[1, 4], module(x[1, 4]), atol=1e-6, rtol=1e-5
    )  # another order of summation
    changed = x.clone()
    changed[1, 4] += 1
    moved = (module(changed) - whole).abs().amax(-1) > 0
    assert moved.nonzero().tolist() == [[1, 4]]


def test_it_starts_closed_with_one_factor_at_zero():
    for fields in ({}, {"gate": "learned"}, {"value_proj": False, "value_dim": HIDDEN, "value_init": "zero"}):
        torch.manual_seed(0)
        module, x = ml.ProductKeyMemory(config(**fields), HIDDEN), torch.randn(4, HIDDEN)
        out = module(x)
        assert not out.any()
        (out * torch.randn_like(out)).sum().backward()
        factor = module.value_proj.weight if module.config.value_proj else module.values
        assert factor.grad.abs().max() > 0 and not factor.any()
        assert all(p.any() for p in module.parameters() if p is not factor)
    module = ml.ProductKeyMemory(config(gate="learned", gate_bias=-5.0), HIDDEN)
    assert torch.sigmoid(module.gate(torch.randn(100, HIDDEN))).max() < 0.02


def test_scores_have_a_spread_of_one_at_the_start():
    torch.manual_seed(0)
    seen = []
    module = ml.ProductKeyMemory(ml.ProductKeyMemoryConfig(n_keys=64, heads=2, top_k=4, key_dim=64), 128)
    module.observers.append(lambda indices, weights: seen.append((indices, weights)))
    module(torch.randn(50, 128))
    ((indices, weights),) = seen
    assert indices.shape == weights.shape == (50, 8) and indices.max() < 64**2
    heads = weights.view(50, 2, 4)
    torch.testing.assert_close(heads.sum(-1), torch.ones(50, 2))
    assert 0.3 < heads.max(-1).values.mean() < 0.7, "neither all on one slot nor even over four"


def test_a_shared_pool_gets_the_gradients_of_both():
    torch.manual_seed(1)
    pool = torch.nn.Parameter(torch.randn(36, 10))
    first, second = (ml.ProductKeyMemory(config(gate="none"), HIDDEN, own_values=False) for _ in range(2))
    for module in (first, second):
        assert "values" not in dict(module.named_parameters())
        torch.nn.init.normal_(module.value_proj.weight)
    x = torch.randn(5, HIDDEN)
    grads = [torch.autograd.grad(m(x, pool).sum(), pool)[0] for m in (first, second)]
    both = torch.autograd.grad(first(x, pool).sum() + second(x, pool).sum(), pool)[0]
    torch.testing.assert_close(both, grads[0] + grads[1])
    with pytest.raises(ValueError, match="no values of its own"):
        first(x)
    with pytest.raises(
        ValueError, match="shape \\(36, 9\\), this memory reads 36 slots of 10; a pool can be shared"
    ):
        first(x, torch.randn(36, 9))


def test_sparse_gradients_equal_dense_ones():
    x, grads = torch.randn(6, HIDDEN), []
    for sparse in (False, True):
        module = memory(torch.float32)
        module.sparse = sparse
        module(x).pow(2).sum().backward()
        assert module.values.grad.is_sparse == sparse
        grads.append(module.values.grad.to_dense() if sparse else module.values.grad)
    assert torch.equal(*grads)


def test_dropout_only_in_training():
    module, x = memory(torch.float32, dropout=0.5), torch.randn(4, HIDDEN)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_gives_its_dtype_and_float32_weights(dtype):
    module, x = memory(torch.float32), torch.randn(8, HIDDEN)
    out = module(x.to(dtype))
    assert out.dtype == dtype
    # The memory computes in its own float32: what differs is the input's rounding, 2^-8 in bf16, which may also
    # choose another slot now and then.
    relative = (out.float() - module(x.to(dtype).float())).norm() / out.float().norm()
    assert relative < 2**-8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7}, "top_k: 7 is more than n_keys 6"),
        ({"key_dim": 7}, "key_dim: 7 is odd"),
        ({"n_keys": 6.5}, "n_keys"),
        ({"n_keys": "many"}, "n_keys"),
        ({"n_keyz": 6}, "n_keyz: unknown field, did you mean 'n_keys'"),
        ({"value_proj": False}, "value_init: must be zero without value_proj"),
        ({"value_init": "zero"}, "value_init: zero values and a value_proj that starts at 0"),
        ({"layers": []}, "layers"),
        ({"score": "max"}, "score"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ml.ConfigError, match=message):
        config(**fields)


def test_a_width_that_does_not_fit():
    with pytest.raises(
        ml.ConfigError, match="value_dim: without value_proj a slot must be as wide as the model, 12"
    ):
        ml.ProductKeyMemory(config(value_proj=False, value_init="zero"), HIDDEN)


def test_a_table_larger_than_memory_says_its_bytes():
    with pytest.raises(
        ml.ConfigError, match=r"n_keys: .* takes 1,125,899,906,842,624 bytes, [\d,]+ are free"
    ):
        ml.ProductKeyMemory(config(n_keys=65_536, value_dim=65_536), HIDDEN)


def test_nan_is_named_and_not_spread():
    module, x = memory(torch.float32), torch.randn(2, 3, HIDDEN)
    x[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*\(1, 2"):
        module(x)
