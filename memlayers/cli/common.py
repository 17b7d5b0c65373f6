"""What the commands share: errors as one paragraph, quiet libraries, files that travel with the package."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback too.")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns every error of a command into one paragraph on stderr and exit code 1; `--debug` raises it."""

    @functools.wraps(function)
    def run(*args, debug: bool = False, **kwargs):
        try:
            return function(*args, debug=debug, **kwargs)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            # What typer and click raise to end a command or to report a wrong option goes on to them.
            if debug or type(error).__module__.partition(".")[0] in ("click", "typer"):
                raise
            show(error)
            raise typer.Exit(1) from None

    return run


def show(error: Exception) -> None:
    """Prints `error` as a panel on stderr."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from memlayers.errors import paragraph

    Console(stderr=True).print(
        Panel(
            Text(paragraph(error)),
            title="error",
            title_align="left",
            subtitle="--debug shows the traceback",
            subtitle_align="right",
            border_style="red",
        )
    )


def quiet() -> None:
    """Keeps transformers' progress bars and warnings out of the way of what a command prints."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_base(base: str):
    """The base model, remembered by its absolute path where it is a folder.

    Raises `FileNotFoundError` naming `base` where neither a folder nor the hub has it.
    """
    from memlayers.errors import first_line
    from memlayers.loading import load_causal_lm

    folder = Path(base)
    source = str(folder.resolve()) if folder.is_dir() else base
    try:
        return load_causal_lm(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{base}: no causal language model can be loaded from there. Give a folder in the Hugging Face "
            f"format or a hub id. What was found: {first_line(error)}"
        ) from error


def packaged(name: str) -> Path:
    """A file or folder that comes with memlayers, such as `configs/train/demo_passkey.yaml`.

    In a checkout `configs` lies beside the package, in the wheel inside it: both are on its search path.
    """
    import memlayers

    for place in map(Path, memlayers.__path__):
        if (place / name).exists():
            return place / name
    raise FileNotFoundError(f"{name} is missing from this installation of memlayers; install it again")
