"""`memlayers inspect`: what is in a folder that `save` wrote."""

from __future__ import annotations

from pathlib import Path
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
    text: Annotated[
        Path | None,
        typer.Option(help="A text file to read: which slots of the memories' tables does it use?"),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where to draw the use of slots, with --text (PNG).")
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
    if text is not None:
        console.print(usage_table(read_text(model, folder, text), text, picture))
    elif picture is not None:
        raise typer.BadParameter("--picture needs --text, the text whose reads are drawn")


def table(model):
    """A rich table of the memories of `model`, a row each."""
    from rich.table import Table

    import memlayers as ml
    from memlayers.core.model import embedding_width

    columns = ["memory", "kind", "fields", "parameters", "state bytes a row", "more a segment"]
    out = Table(*columns[:3], title="memories")
    for column in columns[3:]:
        out.add_column(column, justify="right")
    for name, memory in ml.memories(model).items():
        fields = memory.config.model_dump(exclude={"type"})
        start, more = state_bytes(memory, embedding_width(model))
        out.add_row(
            name,
            memory.config.type,
            "\n".join(f"{key}: {value}" for key, value in fields.items()),
            f"{sum(p.numel() for p in memory.parameters()):,}",
            f"{start:,}",
            f"{more:,}",
        )
    return out


def state_bytes(memory, width: int) -> tuple[int, int]:
    """Bytes of one row's state before anything was read, and what one segment adds to it; width: of the embeddings."""
    import torch

    from memlayers.core.memory import LayerMemory, StatefulMemory

    if not isinstance(memory, StatefulMemory):
        return 0, 0
    with torch.no_grad():
        start = memory.new_state(1)
        size = sum(t.nbytes for t in start.values())
        if isinstance(memory, LayerMemory) or memory.schedule.kv != "drop":
            return size, 0  # what layers keep stays as large as it is
        inputs = memory.write_inputs(start)
        device = next(iter(start.values())).device
        segment = torch.zeros(1, memory.schedule.reach, width, device=device)
        written = segment[:, -1:] if inputs is None else torch.zeros_like(inputs)
        mask = torch.ones(segment.shape[:2], dtype=torch.bool, device=device)
        after = memory.update(start, written, segment, mask)
    return size, sum(t.nbytes for t in after.values()) - size


def read_text(model, folder: str, text: Path) -> dict:
    """Slot usage of every layer of `model` that reads a table while it reads a text file, window by window.

    Raises:
        ValueError: no memory with tables, or an empty text.
    """
    import torch
    from accelerate.utils import tqdm

    import memlayers as ml
    from memlayers import files
    from memlayers.core.usage import track_usage
    from memlayers.train.kinds import that_do

    if not any(memory.readers() for memory in ml.memories(model).values()):
        raise ValueError(
            f"{folder} has no memory of kind {that_do('readers')}, so there are no slots to count"
        )
    words = files.read_text(text)
    ids = torch.tensor(tokenizer_of(model, folder)(words, verbose=False)["input_ids"])
    if not words.strip():
        raise ValueError(f"{text} is empty")
    with torch.no_grad(), track_usage(model) as usage:
        for part in tqdm(ids.split(min(ml.window(model) or 512, 512)), desc="reading", leave=False):
            model(part[None], use_cache=False)
    return usage


def tokenizer_of(model, folder: str):
    """The tokenizer beside the memory, else that of its base."""
    from memlayers.loading import load_tokenizer

    for source in (folder, f"{folder}/base", model.config._name_or_path):
        try:
            return load_tokenizer(source)
        except (OSError, ValueError):
            continue
    raise FileNotFoundError(f"no tokenizer in {folder} or its base {model.config._name_or_path!r}")


def usage_table(usage: dict, text: Path, picture: Path | None):
    """A rich table of the figures of each counter, a column a layer; draws the picture where one is asked."""
    from rich.table import Table

    from memlayers.core.usage import draw_usage

    if picture is not None:
        draw_usage(usage, picture)
    summaries = {name: counter.summary() for name, counter in usage.items()}
    out = Table("figure", title=f"slots that {text.name} reads")
    for name in summaries:
        out.add_column(name, justify="right")
    for figure in next(iter(summaries.values())):
        out.add_row(figure, *(f"{summary[figure]:,.3f}" for summary in summaries.values()))
    return out
