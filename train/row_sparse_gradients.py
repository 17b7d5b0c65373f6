"""Row-sparse gradients over several processes: DDP does not take them, unless an `nn.Embedding` makes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayers.optim import coalesce_rows


def prepare_objective(
    accelerator: Accelerator, objective: nn.Module, tables: Iterable[nn.Parameter]
) -> nn.Module:
    """What `accelerator.prepare` makes of `objective`, with `tables` left out of DDP; see `average_row_sparse`.

    Where nothing but tables learns there is nothing to do for DDP, and it is left out as a whole.
    """
    left_out = {id(table) for table in tables}
    names = [n for n, p in objective.named_parameters(remove_duplicate=False) if id(p) in left_out]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, names)
    for_ddp = any(p.requires_grad and id(p) not in left_out for p in objective.parameters())
    return accelerator.prepare_model(objective, evaluation_mode=not for_ddp)


def average_row_sparse(accelerator: Accelerator, tables: Iterable[nn.Parameter]) -> None:
    """Replace the gradient of each table by its mean over all processes, as DDP does with dense ones.

    Only rows that some process has read are sent. All processes sum the same rows in the same order and so
    stay equal bit for bit. One process alone changes nothing.
    """
    if accelerator.num_processes == 1:
        return
    for table in tables:
        gradient = table.grad
        if gradient is None:  # not read here, but perhaps elsewhere
            empty = torch.empty((1, 0), dtype=torch.int64, device=table.device)
            gradient = torch.sparse_coo_tensor(empty, table.new_empty((0, *table.shape[1:])), table.shape)
        gradient = coalesce_rows(gradient)
        rows = accelerator.pad_across_processes(gradient.indices()[0], pad_index=-1)
        values = accelerator.pad_across_processes(gradient.values())
        rows, values = accelerator.gather(rows), accelerator.gather(values)
        read = rows >= 0
        values = values[read].div_(accelerator.num_processes)
        table.grad = torch.sparse_coo_tensor(
            rows[read][None], values, table.shape, check_invariants=False
        ).coalesce()
