"""`memlayers inspect`: what is in a folder that `save` wrote."""

from __future__ import annotations

from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, quiet


@command
def inspect(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder that `wrap` or `train` wrote, or its hub id.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base, in place of the recorded one.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show the memories in DIR: their kinds, fields, parameters, and the bytes of state they keep.

    The checkpoint is loaded with its base, so a cut or foreign file is found here too.

    State bytes are per row of a batch: before anything was read, and what each further segment adds
    (0 for a recurrent memory, which stays as large as it is).
    """
    quiet()
    from rich.console import Console

    import memlayers as ml

    model = ml.load(folder, base=base)
    config = model.config
    console = Console()
    console.print(table(model))
    n_base = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for _, p in ml.memory_parameters(model)
    )
    console.print(
        f"base: {type(model).__name__}, {n_base:,} parameters, {config._name_or_path}", soft_wrap=True
    )
    console.print(f"attention reaches {ml.window(model):,} tokens")


def table(model):
    """A rich table of the memories of `model`, a row each."""
    from rich.table import Table

    import memlayers as ml

    columns = ["memory", "kind", "fields", "parameters", "state bytes a row", "more a segment"]
    out = Table(*columns[:3], title="memories")
    for column in columns[3:]:
        out.add_column(column, justify="right")
    for name, memory in ml.memories(model).items():
        fields = memory.config.model_dump(exclude={"type"})
        start, more = state_bytes(memory)
        out.add_row(
            name,
            memory.config.type,
            "\n".join(f"{key}: {value}" for key, value in fields.items()),
            f"{sum(p.numel() for p in memory.parameters()):,}",
            f"{start:,}",
            f"{more:,}",
        )
    return out


def state_bytes(memory) -> tuple[int, int]:
    """Bytes of one row's state before anything was read, and what one segment adds to it."""
    import torch

    with torch.no_grad():
        start = memory.new_state(1)
        size = sum(t.nbytes for t in start.values())
        if memory.segment_length is None:
            return size, 0
        hidden = torch.zeros_like(memory.write_inputs(start))
        after = memory.update(start, hidden, torch.ones(1, dtype=torch.bool, device=hidden.device))
    return size, sum(t.nbytes for t in after.values()) - size
