"""The tables of config fields in docs/kinds, made from the classes: `python tests/kind_fields.py` writes them anew."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path

from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
PAGES = ROOT / "docs" / "kinds"
TABLE = re.compile(r"<!-- fields of ([\w.]+) -->\n.*?<!-- end -->", re.DOTALL)


def descriptions(config: type) -> dict[str, str]:
    """What the docstring says of each field; a line such as `theta, eta: ...` is of both."""
    text = inspect.getdoc(config).split("Attributes:\n", 1)[1]
    found = {}
    for part in re.split(r"\n(?=    \w[\w, ]*:)", "\n" + text):
        names, _, told = part.strip().partition(":")
        for name in names.split(", "):
            found[name.strip()] = " ".join(told.split())
    return found


def kind_of(annotation) -> str:
    """An annotation as a reader of YAML would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return f"{kind_of(arguments[0])} → {kind_of(arguments[1])}"
    if arguments:
        return " or ".join(kind_of(a) for a in arguments if a is not type(None))
    names = {int: "whole number", float: "number", bool: "yes or no", str: "text"}
    return names.get(annotation, f"section `{getattr(annotation, '__name__', annotation)}`")


def default_of(field) -> str:
    if field.default is PydanticUndefined:
        return "`[]`" if field.default_factory is list else "`{}`" if field.default_factory else "required"
    plain = isinstance(field.default, (int, float, str, bool, list, type(None)))
    return f"`{field.default!r}`".replace("'", "") if plain else "its defaults"


def table(config: type) -> str:
    """The fields of a config class as a Markdown table."""
    told = descriptions(config)
    lines = ["| field | values | default | |", "|---|---|---|---|"]
    for name, field in config.model_fields.items():
        if name != "type":
            lines.append(
                f"| `{name}` | {kind_of(field.annotation)} | {default_of(field)} | {told[name]} |".replace(
                    "||", "\\|\\|"
                )
            )
    return "\n".join(lines)


def page(path: Path) -> str:
    """The text of a page with its tables as the classes are now."""
    import memlayers as ml
    from memlayers import writing

    def made(found: re.Match) -> str:
        config = getattr(ml, found[1], None) or getattr(writing.config, found[1])
        return f"<!-- fields of {found[1]} -->\n{table(config)}\n<!-- end -->"

    return TABLE.sub(made, path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(page(path), encoding="utf-8")
