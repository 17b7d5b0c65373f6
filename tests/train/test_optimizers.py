"""What learns, at which rate, by which optimizer, and the gradient norm."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import memlayers as ml
from memlayers.core.model import value_tables
from memlayers.optim import RowSparseAdamW, clip_gradients
from memlayers.train.model import build_model
from memlayers.train.optimizers import (
    make_optimizers,
    parameter_groups,
    row_sparse_tables,
)
from memlayers.train.run import train

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


def with_facts(fields, values: dict | None, **changes) -> dict:
    """A run with a product-key memory of two tables, read with full attention, and rates of 0.01."""
    memory = {"type": "product_key", "layers": [0, 1], "n_keys": 16, "heads": 2, "top_k": 3, "key_dim": 8}
    data = {**fields()["data"], "regime": "F", "segment_length": 24}
    optimizer = {"learning_rate": 0.01, **({} if values is None else {"values": values})}
    memories = {"facts": {**memory, "share_values": False}}
    return {"memories": memories, "data": data, "optimizer": optimizer, "train_what": "memory", **changes}


def test_value_tables_get_an_optimizer_of_their_own(config, fields):
    values = {"learning_rate": 0.7, "state": "row", "betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.2}
    run = config(**with_facts(fields, values, seed=5))
    model, _ = build_model(run)
    tables = row_sparse_tables(model, run.optimizer)
    adamw, row_sparse = make_optimizers(model, run, tables)
    assert type(adamw) is torch.optim.AdamW
    assert type(row_sparse) is RowSparseAdamW
    (group,) = row_sparse.param_groups
    assert group["parameter_names"] == [f"memlayers.facts.layers.{i}.values" for i in (0, 1)]
    expected = {"lr": 0.7, "state": "row", "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2, "seed": 5}
    assert {key: group[key] for key in expected} == expected
    taken = [id(p) for o in (adamw, row_sparse) for g in o.param_groups for p in g["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(layer.sparse for m in ml.memories(model).values() for layer in m.layers.values())


def test_without_that_section_value_tables_learn_in_adamw(config, fields):
    run = config(**with_facts(fields, None))
    model, _ = build_model(run)
    assert row_sparse_tables(model, run.optimizer) == {}
    (adamw,) = make_optimizers(model, run, {})
    taken = {id(p) for group in adamw.param_groups for p in group["params"] if group["weight_decay"] == 0}
    assert {id(table) for table in value_tables(model).values()} <= taken
    assert not any(layer.sparse for m in ml.memories(model).values() for layer in m.layers.values())


def test_a_run_in_which_only_value_tables_learn(config, fields):
    run = config(**with_facts(fields, {}))
    model, _ = build_model(run)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in value_tables(model))
    (only,) = make_optimizers(model, run, row_sparse_tables(model, run.optimizer))
    assert type(only) is RowSparseAdamW


def test_values_without_a_value_table_are_an_error(config, fields):
    with pytest.raises(
        ml.ConfigError, match=r"^optimizer\.values: no memory .* has a value table that learns"
    ):
        train(config(optimizer={"values": {}}))


def test_both_ways_of_training_a_table_take_the_same_first_step(config, fields, tmp_path):
    """In its first step AdamW leaves a row without gradient where it is. (Later its momentum moves it.)"""
    found = {}
    for name, values in {"dense": None, "sparse": {"learning_rate": 0.01, "eps": 1e-3}}.items():
        run = with_facts(fields, values, max_steps=1, clip=0.1, output_dir=str(tmp_path / name))
        run["memories"]["facts"].update(value_proj=False, value_init="zero")  # values get a gradient at once
        run["optimizer"]["eps"] = 1e-3
        train(config(**run))
        found[name] = load_file(tmp_path / name / "checkpoints" / "step-00000001" / "model.safetensors")
    for key in (f"memlayers.facts.layers.{i}.values" for i in (0, 1)):
        moved = found["sparse"][key].any(1)
        assert 0 < moved.sum() < len(moved)
        assert torch.equal(moved, found["dense"][key].any(1))
    for key, tensor in found["dense"].items():
        torch.testing.assert_close(found["sparse"][key], tensor, rtol=1e-5, atol=1e-6)


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
