"""`memlayers wrap`: put memories into a checkpoint and save them beside its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memlayers.cli.common import Debug, command, load_base, quiet


@command
def wrap(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="A causal language model: a folder in the Hugging Face format or a hub id."
        ),
    ],
    config: Annotated[
        Path,
        typer.Option("--config", "-c", help="YAML file with the memories to attach.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; made if missing.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Fields to set over the file, such as memories.stream.n_tokens=8."
        ),
    ] = None,
    save_base: Annotated[
        bool, typer.Option("--save-base", help="Copy the base and its tokenizer into OUT/base too.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Attach untrained memories to BASE and save them to OUT.

    The base is named in OUT, not copied, and stays as it is: `memlayers.load(OUT)` loads it, attaches the
    memories and fills them. Train them with `memlayers train`.

    The YAML file names each memory and gives its kind and fields:

        memories:
          stream: {type: tokens, n_tokens: 16, segment_length: 512}
    """
    quiet()
    import torch
    from rich.console import Console

    import memlayers as ml
    from memlayers.cli.inspect import table
    from memlayers.config import ConfigError, Strict
    from memlayers.kinds import AnyMemoryConfig
    from memlayers.loading import load_tokenizer
    from memlayers.yaml_config import load_yaml

    class WrapConfig(Strict):
        memories: dict[str, AnyMemoryConfig]

    wanted = load_yaml(config, overrides or [], WrapConfig).memories
    if not wanted:
        raise ConfigError(f"memories: {config} names no memory; give at least one, by name")
    if out.is_file():
        raise NotADirectoryError(f"--out {out} is a file; give a folder, or a name that is free")
    torch.manual_seed(0)
    model = load_base(base)
    for name, block in wanted.items():
        ml.attach(model, block, name=name)
    ml.save(model, out, save_base=save_base, tokenizer=load_tokenizer(base) if save_base else None)
    console = Console()
    console.print(table(model))
    console.print(f"wrote {out}", soft_wrap=True)
