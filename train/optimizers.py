"""What learns, parameter groups, the optimizers and their schedules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import get_scheduler

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.core.linear import Linear
from memlayers.core.model import frozen_parameters, sparse_gradients, value_tables
from memlayers.optim import RowSparseAdamW

from .config import OptimizerSection, TrainConfig
from .kinds import that_do

LORA = ".lora_"
"""In the names of all parameters that PEFT adds: lora_A, lora_B, lora_embedding_A, lora_magnitude_vector."""


def choose_parameters(model: nn.Module, train_what: str) -> None:
    """Set `requires_grad` of every parameter: memories learn, or their value tables alone; base or LoRA learn
    when `train_what` says so. What a memory's config leaves out never learns.

    Raises:
        ConfigError: nothing would learn.
    """
    if train_what == "values":
        _check_values_can_learn(model)
    memory = dict(ml.memory_parameters(model))
    learning = value_tables(model) if train_what == "values" else memory.keys() - frozen_parameters(model)
    for name, parameter in model.named_parameters():
        if name in memory:
            parameter.requires_grad_(name in learning)
        elif LORA in name:
            parameter.requires_grad_(train_what == "memory_and_lora")
        else:
            parameter.requires_grad_(train_what == "memory_and_base")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "train_what: nothing would learn, because the model has no memory and its base is frozen; add a "
            "memory under memories, or set train_what: memory_and_base"
        )


def _check_values_can_learn(model: nn.Module) -> None:
    for name, memory in ml.memories(model).items():
        if told := memory.check_tables_can_learn():
            raise ConfigError(
                f"train_what: values alone cannot learn, because {told.format(name=name)}; train with train_what: memory "
                "first"
            )


def row_sparse_tables(model: nn.Module, config: OptimizerSection) -> dict[str, nn.Parameter]:
    """The value tables that `optimizer.values` is for, by name; none without that section.

    Their gradients are made row-sparse.

    Raises:
        ConfigError: the section is given and no value table learns.
    """
    if config.values is None:
        return {}
    tables = {name: table for name, table in value_tables(model).items() if table.requires_grad}
    if not tables:
        raise ConfigError(
            "optimizer.values: no memory of this model has a value table that learns; add one of type "
            f"{that_do('tables')} under memories, or leave this section out"
        )
    sparse_gradients(model)
    return tables


def parameter_groups(
    model: nn.Module, config: OptimizerSection, leave_out: Iterable[nn.Parameter] = ()
) -> list[dict]:
    """AdamW's groups: memory, base and LoRA, each with and without weight decay. Frozen ones are left out, and
    those of `leave_out`.

    Vectors (norms, biases) have no decay, nor has any parameter of a memory that is used as it stands and not
    as the matrix of a linear map (the tokens a memory starts from, embeddings, tables).
    """
    memory = {id(parameter) for _, parameter in ml.memory_parameters(model)}
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (Linear, nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    rates = {
        "memory": config.learning_rate,
        "base": config.base_learning_rate or config.learning_rate,
        "lora": config.lora_learning_rate or config.learning_rate,
    }
    others = {id(parameter) for parameter in leave_out}
    groups: dict[tuple[str, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in others:
            continue
        part = "memory" if id(parameter) in memory else "lora" if LORA in name else "base"
        decay = parameter.dim() > 1 and (part != "memory" or id(parameter) in matrices)
        groups.setdefault((part, decay), []).append((name, parameter))
    return [
        {
            "name": part if decay else f"{part}_no_decay",
            "params": [parameter for _, parameter in named],
            "parameter_names": [name for name, _ in named],
            "lr": rates[part],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (part, decay), named in groups.items()
    ]


def make_optimizers(
    model: nn.Module, config: TrainConfig, tables: dict[str, nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """AdamW over the parameters that learn, and `RowSparseAdamW` over `tables` (see `row_sparse_tables`)."""
    section, optimizers = config.optimizer, []
    if groups := parameter_groups(model, section, leave_out=tables.values()):
        optimizers.append(
            torch.optim.AdamW(groups, betas=tuple(section.betas), eps=section.eps, fused=section.fused)
        )
    if tables:
        values, names = section.values, list(tables)
        optimizers.append(
            RowSparseAdamW(
                [{"name": "values", "params": list(tables.values()), "parameter_names": names}],
                lr=values.learning_rate,
                betas=tuple(values.betas),
                eps=values.eps,
                weight_decay=values.weight_decay,
                state=values.state,
                seed=config.seed,
            )
        )
    return optimizers


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of `transformers` that the config names, over `max_steps`."""
    kind = "constant_with_warmup" if config.schedule.type == "constant" else config.schedule.type
    return get_scheduler(kind, optimizer, config.schedule.warmup_steps, config.max_steps)
