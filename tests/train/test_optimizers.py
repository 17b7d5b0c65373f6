"""What learns, at which rate, and the gradient norm."""

import pytest
import torch
from torch import nn

import memlayers as ml
from memlayers.train.model import build_model
from memlayers.train.optimizers import clip_gradients, parameter_groups

RATES = {"learning_rate": 0.3, "base_learning_rate": 0.2, "lora_learning_rate": 0.1, "weight_decay": 0.5}


def groups_of(config) -> tuple[nn.Module, dict[str, dict]]:
    model, _ = build_model(config)
    return model, {group["name"]: group for group in parameter_groups(model, config.optimizer)}


def test_memory_alone(config):
    model, groups = groups_of(config(train_what="memory", optimizer=RATES))
    names = [name for group in groups.values() for name in group["parameter_names"]]
    assert sorted(names) == sorted(name for name, _ in ml.memory_parameters(model))
    assert {group["lr"] for group in groups.values()} == {0.3}
    assert "memlayers.stream.initial_memory" in groups["memory_no_decay"]["parameter_names"]


def test_memory_and_base(config):
    model, groups = groups_of(config(train_what="memory_and_base", optimizer=RATES))
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert groups["base"]["lr"] == groups["base_no_decay"]["lr"] == 0.2
    assert groups["base"]["weight_decay"] == 0.5
    assert groups["base_no_decay"]["weight_decay"] == 0.0
    assert "model.norm.weight" in groups["base_no_decay"]["parameter_names"]
    assert "model.layers.0.mlp.up_proj.weight" in groups["base"]["parameter_names"]


def test_memory_and_lora(config):
    lora = {"r": 2, "target_modules": "all-linear"}
    _, groups = groups_of(config(train_what="memory_and_lora", lora=lora, optimizer=RATES))
    assert groups["lora"]["lr"] == 0.1
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in groups["lora"]["parameter_names"]}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any(name.startswith("base") for name in groups)


@pytest.mark.parametrize("largest", [0.5, 100.0, None])
def test_clipping_equals_torch(largest):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for parameter in ours[:2]:
        parameter.grad = torch.randn_like(parameter)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for mine, other in zip(ours, theirs):
        other.grad = None if mine.grad is None else mine.grad.clone()
    norm = clip_gradients(ours, largest)
    expected = torch.nn.utils.clip_grad_norm_(theirs, largest or float("inf"))
    assert torch.allclose(norm, expected)
    for mine, other in zip(ours[:2], theirs):
        assert torch.allclose(mine.grad, other.grad, atol=1e-6)


def test_sparse_gradients_are_clipped_as_dense_ones():
    torch.manual_seed(0)
    rows = torch.tensor([1, 3, 3, 1, 7])  # read more than once: gradients of a row add up before the norm
    tables = [nn.Embedding(10, 4, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    weight = torch.randn(5, 4)
    for table in tables:
        (table(rows) * weight).sum().backward()
    norms = [clip_gradients(table.parameters(), 0.1) for table in tables]
    assert tables[0].weight.grad.is_sparse
    assert torch.allclose(norms[0], norms[1])
    assert torch.allclose(tables[0].weight.grad.to_dense(), tables[1].weight.grad)
    assert tables[1].weight.grad.norm() <= 0.1 + 1e-6
