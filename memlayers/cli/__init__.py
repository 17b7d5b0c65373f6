"""`memlayers` on the command line: wrap | train | eval | report | compare | demo | bench | inspect. One file a command."""

import typer

from memlayers.cli.bench import bench
from memlayers.cli.demo import demo
from memlayers.cli.evaluate import compare, evaluate, report
from memlayers.cli.inspect import inspect
from memlayers.cli.train import train
from memlayers.cli.wrap import wrap

app = typer.Typer(
    name="memlayers",
    help="Memory for Hugging Face causal language models: wrap a checkpoint, train it, measure what it "
    "remembers. Each command explains itself: memlayers train --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("wrap")(wrap)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("compare")(compare)
app.command("demo")(demo)
app.command("bench")(bench)
app.command("inspect")(inspect)


@app.callback()
def main() -> None:
    """The callback keeps `memlayers COMMAND` the form of every call."""
