"""AdamW for large tables of which a step reads few rows: its cost follows the rows that have a gradient."""

from __future__ import annotations

import math
import mmap
import random
from collections.abc import Iterator
from typing import Any

import torch

STATES = ("float32", "bfloat16", "row")
CHUNK_CPU, CHUNK_GPU = 2**16, 2**24
"""Elements of a table that are worked on at a time: temporary tensors stay in the cache of a CPU, and small
however many rows were read."""


class RowSparseAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) on the rows of tables that have a gradient in this step, and on nothing else.

    Every row is as if it were alone and trained by `torch.optim.AdamW` in the steps that touch it. For a row θ
    with gradient g, touched for the t-th time:

        θ ← θ − lr λ θ
        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

    A row that is not touched keeps its bits, and its m and v do not decay. All arithmetic is in float32.

    `state` says how m and v are kept, for a table of n rows and d columns:

    - `float32`: both as (n, d) float32. 8 bytes an element.
    - `bfloat16`: both as (n, d) bfloat16, rounded stochastically: up or down at random, so that the mean is the
      value itself. 4 bytes an element. Rounding to nearest would stall: at β₂ = 0.999 a step changes v by about a
      thousandth, bfloat16 resolves 1/256, and v would keep its value however small gradients become. Rounded at
      random it follows, without bias; after thousands of steps √v is off by about 2% and m by 0.5% (one sigma).
    - `row`: m as (n, d) float32, v as one float32 a row that follows the mean of g² over the row (the row factor
      of Adafactor, 1804.04235; row-wise Adagrad). 4 bytes an element.

    A bfloat16 table is rounded stochastically too, for the same reason. The random bits of a step are a function
    of `seed`, the table's place and the number of steps it has taken, which is part of the state: a resumed run
    draws the same ones, and so do all processes of a distributed run.

    On a CPU, pages of m and v come into memory when their rows are first touched.

    Args:
        params: tables (n, d), float32 or bfloat16, or groups of them.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ; acts on a row only when it is touched.
        state: `float32`, `bfloat16` or `row`.
        seed: of stochastic rounding.

    Raises:
        ValueError: an option out of its range, or a parameter that is not a table.
        TypeError: a table of another dtype.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state: str = "float32",
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "state": state, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, and checks the group."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the rows that have a gradient. Gradients may be coalesced or not; rows that occur more than
        once count once, with the sum of their gradients.

        Raises:
            TypeError: a gradient that is not row-sparse; nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [(group, table) for group in self.param_groups for table in group["params"]]
        for group, table in tables:
            _check_gradient(group, table)
        for place, (group, table) in enumerate(tables):
            if table.grad is not None:
                self._step_table(group, table, place)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state keeps its own dtypes, which are not those of the tables."""
        super().load_state_dict({**state_dict, "state": {}})
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for place, table in zip(places, tables, strict=True):
            if place in state_dict["state"]:
                self.state[table] = {
                    key: value.to(table.device) if isinstance(value, torch.Tensor) else value
                    for key, value in state_dict["state"][place].items()
                }

    def _step_table(self, group: dict[str, Any], table: torch.Tensor, place: int) -> None:
        gradient = coalesce_rows(table.grad)
        rows, values = gradient.indices()[0], gradient.values()
        if len(rows) == 0:
            return
        state = self.state[table]
        if not state:
            state.update(_new_state(table, group["state"]))
        noise = None
        if torch.bfloat16 in (table.dtype, state["exp_avg"].dtype):
            seed = random.Random(f"memlayers:rounding:{group['seed']}:{place}:{state['n_steps']}")
            noise = torch.Generator(table.device).manual_seed(seed.getrandbits(63))
        chunk = CHUNK_CPU if table.device.type == "cpu" else CHUNK_GPU
        size = max(1, chunk // max(1, table.shape[1]))
        for chosen, g in zip(rows.split(size), values.split(size)):
            _update(table, chosen, g.float(), state, group, noise)
        state["n_steps"] += 1


def _update(
    table: torch.Tensor,
    rows: torch.Tensor,
    g: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    noise: torch.Generator | None,
) -> None:
    """One step of `rows` (k,), all different, with gradients `g` (k, d) float32."""
    (beta_1, beta_2), lr = group["betas"], group["lr"]
    steps = state["row_steps"].index_select(0, rows).add_(1)
    m = state["exp_avg"].index_select(0, rows).float().lerp_(g, 1 - beta_1)
    v = state["exp_avg_sq"].index_select(0, rows).float().mul_(beta_2)
    if group["state"] == "row":
        v.add_(g.square().mean(1, keepdim=True), alpha=1 - beta_2)
    else:
        v.addcmul_(g, g, value=1 - beta_2)
    carries = None if noise is None else _carries(g.shape, noise)
    state["row_steps"].index_copy_(0, rows, steps)
    _store(state["exp_avg"], rows, m, carries)
    _store(state["exp_avg_sq"], rows, v, carries)

    scale = v.sqrt_().div_(_one_minus_power(beta_2, steps).sqrt_()).add_(group["eps"])
    updated = table.index_select(0, rows).float().mul_(1 - lr * group["weight_decay"])
    updated.addcdiv_(m.div_(_one_minus_power(beta_1, steps)), scale, value=-lr)
    _store(table, rows, updated, carries)


def _one_minus_power(beta: float, steps: torch.Tensor) -> torch.Tensor:
    """1 − β^steps as a float32 column; exact to rounding also where β^steps is near 1."""
    return torch.expm1(steps.float() * (math.log(beta) if beta else -math.inf)).neg_().unsqueeze(1)


def _store(
    target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, carries: Iterator[torch.Tensor] | None
) -> None:
    if target.dtype == torch.bfloat16:
        values = round_stochastically(values, next(carries))
    target.index_copy_(0, rows, values)


def _carries(shape: torch.Size, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Tensors of random int32 in [0, 2¹⁶); a draw of 64 bits gives four."""
    size = shape.numel()
    while True:
        bits = torch.empty((size + 1) // 2, dtype=torch.int64, device=generator.device)
        bits = bits.random_(-(2**63), None, generator=generator).view(torch.int32)[:size].view(shape)
        yield bits.bitwise_and(0xFFFF)
        yield bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def coalesce_rows(gradient: torch.Tensor) -> torch.Tensor:
    """`gradient.coalesce()` of a row-sparse gradient, without its sort and copy where the rows rise already.

    A coalesced gradient of a backward pass loses its mark, not its order, on the way into `.grad`.
    """
    if gradient.is_coalesced():
        return gradient
    rows, values = gradient._indices(), gradient._values()
    if bool((rows[0, 1:] > rows[0, :-1]).all()):
        return torch.sparse_coo_tensor(
            rows, values, gradient.shape, is_coalesced=True, check_invariants=False
        )
    return gradient.coalesce()


def round_stochastically(x: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16: to one of the two neighbours, each with the probability that makes the mean x.

    bfloat16 is the upper half of a float32's bits. A random number added to the lower half carries into the upper
    one with the probability that the lower half stands for.

    Args:
        carry: int32 of the shape of x, uniform in [0, 2¹⁶); is overwritten.
    """
    return carry.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def _new_state(table: torch.Tensor, kind: str) -> dict[str, Any]:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    second = (len(table), 1) if kind == "row" else tuple(table.shape)
    return {
        "n_steps": 0,
        "row_steps": _zeros((len(table),), torch.int32, table.device),
        "exp_avg": _zeros(tuple(table.shape), dtype, table.device),
        "exp_avg_sq": _zeros(second, dtype, table.device),
    }


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on a CPU, take memory only where they are written: `torch.zeros` writes them all, and
    `numpy.zeros` asks for huge pages, of which a few thousand rows touch all."""
    size = math.prod(shape)
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, **private), dtype=dtype).view(shape)


def _check_group(group: dict[str, Any]) -> None:
    ranges = [
        ("lr", group["lr"] >= 0, "at least 0"),
        ("betas", len(group["betas"]) == 2 and all(0 <= b < 1 for b in group["betas"]), "two of [0, 1)"),
        ("eps", group["eps"] > 0, "above 0"),
        ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
        ("state", group["state"] in STATES, f"one of {', '.join(STATES)}"),
    ]
    for name, good, wanted in ranges:
        if not good:
            raise ValueError(f"{name}: must be {wanted}, not {group[name]!r}")
    for table in group["params"]:
        if table.dim() != 2:
            raise ValueError(f"params: needs tables of rows and columns, not shape {tuple(table.shape)}")
        if table.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"params: needs float32 or bfloat16, not {table.dtype}")


def _check_gradient(group: dict[str, Any], table: torch.Tensor) -> None:
    gradient = table.grad
    if gradient is None or (gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1):
        return
    raise TypeError(
        f"RowSparseAdamW needs row-sparse gradients (torch.sparse_coo with one sparse dimension); a table of shape "
        f"{tuple(table.shape)} in group {group.get('name', 'params')!r} has a dense or other one. Switch them on "
        "(memlayers.product_key.sparse_gradients(model), nn.Embedding(sparse=True)) or use torch.optim.AdamW for it"
    )
