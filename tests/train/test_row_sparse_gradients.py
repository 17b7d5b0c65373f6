"""The mean of row-sparse gradients over two processes. This file is also the program that the processes run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from memlayers.train.row_sparse_gradients import average_row_sparse, prepare_objective

READS = [[[0, 2, 2, 5], [1]], [[2, 3], []]]
"""By process and table: rows that both read, that one reads twice, and a table that one does not read."""


class Reader(nn.Module):
    """Reads rows of two tables and sums them in a linear layer. DDP does not know its gradients to be sparse."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        tables = [
            torch.randn(6, 3, generator=generator).to(dtype) for dtype in (torch.float32, torch.bfloat16)
        ]
        self.tables = nn.ParameterList(tables)
        self.linear = nn.Linear(3, 1)
        nn.init.constant_(self.linear.weight, 0.5)

    def forward(self, reads: list[list[int]]) -> torch.Tensor:
        total = torch.zeros(())
        for rows, table in zip(reads, self.tables):
            if rows:
                rows = torch.tensor(rows)
                total = (
                    total + (self.linear(F.embedding(rows, table, sparse=True).float()) * rows[:, None]).sum()
                )
        return total


def gradients(reader: Reader) -> dict[str, list]:
    tables = {str(i): table.grad.to_dense().tolist() for i, table in enumerate(reader.tables)}
    return {
        **tables,
        "linear": None if reader.linear.weight.grad is None else reader.linear.weight.grad.tolist(),
    }


def one_of_two_processes(folder: Path) -> None:
    """Two passes over READS, in a model whose linear layer learns and in one where nothing but tables does."""
    accelerator = Accelerator(cpu=True)
    rank, found = accelerator.process_index, {}
    for what in ("all", "tables"):
        reader = Reader()
        reader.linear.requires_grad_(what == "all")
        whole = nn.Sequential(reader)  # as in training, the tables lie somewhere inside
        objective = prepare_objective(accelerator, whole, list(reader.tables))
        with accelerator.no_sync(objective):
            accelerator.backward(objective(READS[rank]))
        accelerator.backward(objective(READS[rank]))
        average_row_sparse(accelerator, reader.tables)
        found[what] = {"ddp": isinstance(objective, DistributedDataParallel), **gradients(reader)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *launcher, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # bit for bit

    reader = Reader()
    for reads in READS:
        reader(
            reads
        ).backward()  # two passes in each of two processes: the mean is the sum of one pass of each
    for name, gradient in gradients(reader).items():  # multiples of a half, exact in bfloat16
        torch.testing.assert_close(torch.tensor(first["all"][name]), torch.tensor(gradient))
        if name != "linear":
            assert first["tables"][name] == first["all"][name]
    assert first["all"]["ddp"]
    assert not first["tables"]["ddp"]  # nothing is left for DDP
    assert first["tables"]["linear"] is None


def test_one_process_changes_nothing():
    accelerator, reader = Accelerator(cpu=True), Reader()
    objective = prepare_objective(accelerator, reader, list(reader.tables))
    assert objective is reader
    reader(READS[0]).backward()
    before = [table.grad for table in reader.tables]
    average_row_sparse(accelerator, reader.tables)
    assert all(table.grad is gradient for table, gradient in zip(reader.tables, before))


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]))
