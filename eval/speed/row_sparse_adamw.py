"""What a step of RowSparseAdamW costs beside dense AdamW, and how much memory a large table takes to train.

    OMP_NUM_THREADS=1 python -m memlayers.eval.speed.row_sparse_adamw \\
        --output eval/speed/results/row_sparse_adamw_cpu.json

Steps: a table of 1,048,576 × 64, float32, and 8,192 reads of random rows (some twice) a step. Each optimizer has a
table of its own and has taken a step on every row before. In every round each takes one step, so that what else
runs on the machine meets them all; only `step()` is timed. Row-sparse gradients are given as an embedding makes
them, in the order of the reads, and sorting them counts. AdamW gets a dense gradient that is already there. `ratio`
is RowSparseAdamW's time over that of the faster AdamW (plain or fused) in the same round.

Memory: a table of 1,048,576 × 256, float32, is read at random (`weighted_gather`, 32 × 4 rows for each of 1,024
tokens), its gradient clipped and a step taken. Each kind of state runs in a process of its own; the figure is the
peak of resident memory of that process, with python, torch and memlayers.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from memlayers.eval.speed.timing import percentiles, where
from memlayers.files import write_text
from memlayers.kernels.weighted_gather import weighted_gather
from memlayers.optim import clip_gradients
from memlayers.optim.row_sparse_adamw import STATES, RowSparseAdamW

DENSE = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
}
SPARSE = {
    **{f"RowSparseAdamW {state}": partial(RowSparseAdamW, lr=1e-3, state=state) for state in STATES},
    "SparseAdam": partial(torch.optim.SparseAdam, lr=1e-3),
}


def time_steps(n_rows: int, dim: int, n_reads: int, rounds: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """Seconds of a step of each optimizer, (rounds,) each."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n_rows, dim, generator=generator)
    dense = torch.randn(n_rows, dim, generator=generator)
    all_rows = torch.arange(n_rows)[None]
    every_row = torch.sparse_coo_tensor(all_rows, dense, is_coalesced=True, check_invariants=False)
    tables, optimizers = {}, {}
    for name, make in {**DENSE, **SPARSE}.items():
        tables[name] = nn.Parameter(start.clone())
        optimizers[name] = make([tables[name]])
        tables[name].grad = dense if name in DENSE else every_row
        optimizers[name].step()
    times = {name: [] for name in optimizers}
    for _ in range(warm_up + rounds):
        rows = torch.randint(0, n_rows, (1, n_reads), generator=generator)
        values = torch.randn(n_reads, dim, generator=generator)
        for name, optimizer in optimizers.items():
            sparse = torch.sparse_coo_tensor(rows, values, (n_rows, dim), check_invariants=False)
            tables[name].grad = dense if name in DENSE else sparse
            started = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(found[warm_up:]) for name, found in times.items()}


def summarize(times: dict[str, np.ndarray]) -> dict:
    """Milliseconds of a step, and each row-sparse optimizer over the AdamW whose median is lower."""
    yardstick = min(DENSE, key=lambda name: np.median(times[name]))
    return {
        "step_ms": {name: percentiles(1e3 * found) for name, found in times.items()},
        "yardstick": yardstick,
        "ratio": {name: percentiles(times[name] / times[yardstick]) for name in SPARSE},
    }


def train_a_table(
    state: str, n_rows: int, dim: int, steps: int, n_tokens: int = 1024, reads: int = 128
) -> dict:
    """Train a table on random reads in this process; `state` is one of STATES, or `dense` for AdamW.

    Returns:
        the peak of resident memory in MB, the share of rows that were read, and the median time of a step,
        forward and backward pass included.
    """
    torch.manual_seed(0)
    table = nn.Parameter(torch.empty(n_rows, dim).normal_(std=dim**-0.5))
    row_sparse = state != "dense"
    if row_sparse:
        optimizer = RowSparseAdamW([table], state=state)
    else:
        optimizer = torch.optim.AdamW([table], fused=True)
    read, times = torch.zeros(n_rows, dtype=torch.bool), []
    for _ in range(steps):
        indices = torch.randint(0, n_rows, (n_tokens, reads))
        weights = torch.rand(n_tokens, reads).softmax(-1)
        read[indices.flatten()] = True
        started = time.perf_counter()
        weighted_gather(table, indices, weights, sparse=row_sparse).square().mean().backward()
        clip_gradients([table], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return {
        "peak_resident_mb": peak_resident() / 1e6,
        "rows_read": read.float().mean().item(),
        "seconds_per_step": float(np.median(times)),
    }


def peak_resident() -> int:
    """Bytes this process has had resident at most. On Linux `ru_maxrss` begins with the peak of the process that
    started this one, so it is not read from there."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_in_own_process(state: str, n_rows: int, dim: int, steps: int) -> dict:
    """`train_a_table` in a new process, since the peak of a process never falls."""
    code = "import json; from memlayers.eval.speed.row_sparse_adamw import train_a_table; "
    code += f"print(json.dumps(train_a_table({state!r}, {n_rows}, {dim}, {steps})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training a table with state {state} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2**20, help="rows of the tables (default: 1,048,576)")
    parser.add_argument("--dim", type=int, default=64, help="width of the table that is timed (default: 64)")
    parser.add_argument("--reads", type=int, default=8192, help="reads a step (default: 8,192)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of steps (default: 40)")
    parser.add_argument("--memory-dim", type=int, default=256, help="width for memory (default: 256)")
    parser.add_argument("--memory-steps", type=int, default=20, help="steps for memory (default: 20)")
    parser.add_argument("--output", type=Path, help="where to write the JSON as well")
    options = parser.parse_args()

    memory = {
        state: train_in_own_process(state, options.rows, options.memory_dim, options.memory_steps)
        for state in (*STATES, "dense")
    }
    times = time_steps(options.rows, options.dim, options.reads, options.rounds)
    report = {
        "step": {
            "table": [options.rows, options.dim],
            "reads": options.reads,
            "rounds": options.rounds,
            **summarize(times),
        },
        "memory": {"table": [options.rows, options.memory_dim], "steps": options.memory_steps, **memory},
        **where("cpu"),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        write_text(options.output, text + "\n")


if __name__ == "__main__":
    main()
