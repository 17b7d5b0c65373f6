"""What every config of the project shares: strict pydantic models and errors that name the field.

A config is one object in three places: the Python argument, the YAML block and the saved
`memory_config.json`. Unknown keys, wrong types and out-of-range values raise `ConfigError`, whose message
starts with the dotted path of the field and, for a misspelt key, ends with the nearest known one.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from typing import Any, TypeVar

import pydantic

MOST_LEVELS = 50
MOST_VALUES = 1_000_000
"""Values that a config may hold, and levels that they may be nested in."""


class ConfigError(ValueError):
    """A config that cannot be used. The message starts with the dotted path of the field."""


class Strict(pydantic.BaseModel):
    """Base of every config: unknown keys are errors, values are never coerced, numbers are finite, objects are frozen.

    Raises:
        ConfigError: on construction with an unknown field, a wrong type or a value out of range.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **data: Any):
        check_plain(data)
        try:
            super().__init__(**data)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, type(self), where="")) from None


class MemoryConfig(Strict):
    """Fields every kind of memory has. A kind subclasses it and sets `type` to its own literal."""

    type: str


def layer_index(layer: int, n_layers: int, where: str) -> int:
    """A layer counted from 0; negative counts from the end.

    Raises:
        ConfigError: the model has no such layer; names the field `where`.
    """
    if not -n_layers <= layer < n_layers:
        raise ConfigError(
            f"{where}: layer {layer} is out of range, the model has {n_layers} (0 to {n_layers - 1})"
        )
    return layer % n_layers


Model = TypeVar("Model")


def chosen_layers(layers: list[int] | None, n_layers: int) -> list[int]:
    """Layer numbers from 0; None gives up to three, evenly spaced and centred.

    Raises:
        ConfigError: a layer that the model does not have, or one named twice.
    """
    if layers is None:
        count = min(3, n_layers)
        return [(2 * i + 1) * n_layers // (2 * count) for i in range(count)]
    chosen = [layer_index(layer, n_layers, f"layers.{i}") for i, layer in enumerate(layers)]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"layers: {layers} names a layer twice")
    return chosen


def validate(model: type[Model] | Any, data: Any, where: str = "") -> Model:
    """Check `data` (plain dicts, lists and scalars) against a `Strict` class or a union of such classes.

    Args:
        model: a `Strict` subclass or an annotated union of them.
        data: what a YAML or JSON file holds.
        where: dotted path of `data` in its file, put before the names of fields in errors.

    Raises:
        ConfigError: one message that lists every wrong field with its full path.
    """
    check_plain(data, where)
    if isinstance(model, type) and issubclass(model, Strict) and not isinstance(data, dict):
        raise ConfigError(f"{where or 'config'}: expected a mapping of fields, got {type(data).__name__}")
    try:
        return pydantic.TypeAdapter(model).validate_python(data)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, model, where)) from None


def check_plain(data: Any, where: str = "") -> None:
    """Raise `ConfigError` for what no config holds and what would break on the way, before pydantic sees it: names of
    fields that are no strings, text that cannot be written as UTF-8 or to a path, whole numbers beyond 64 bits, more
    than MOST_LEVELS levels (as of a dict in itself), more than MOST_VALUES values (as of YAML anchors in anchors, whose
    values are counted at each place).

    Args:
        data: dicts, lists and tuples are looked into, with all they hold.
        where: dotted path of `data`.
    """
    rest, seen = [(where, 0, data)], 0
    while rest:
        at, level, value = rest.pop()
        seen += 1
        named = at or "config"
        if seen > MOST_VALUES or (isinstance(value, dict | list | tuple) and len(value) > MOST_VALUES):
            raise ConfigError(f"{where or 'config'}: holds more than {MOST_VALUES:,} values")
        if level > MOST_LEVELS:
            raise ConfigError(f"{named:.200}: is more than {MOST_LEVELS} levels deep")
        if isinstance(value, str) and _no_text(value):
            raise ConfigError(f"{named}: {shown(value)} has a character that is no text, such as NUL")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{named}: a whole number with {value.bit_length()} bits, at most 63 are taken")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or _no_text(key):
                    raise ConfigError(f"{named}: {shown(key)} is no name of a field; a name is a text")
            rest += [(f"{at}.{key}" if at else key, level + 1, item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            rest += [(f"{at}.{i}" if at else str(i), level + 1, item) for i, item in enumerate(value)]


def _no_text(text: str) -> bool:
    return re.search("[\x00\ud800-\udfff]", text) is not None


def shown(value: Any) -> str:
    """A value for a message, of at most 200 printable characters, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # such as of a whole number with 5,000 digits, or an object that cannot show itself
        text = f"a {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}..."


def explain(error: pydantic.ValidationError, model: Any, where: str) -> str:
    """One line a wrong field: dotted path, what is wrong, the nearest known name for an unknown key."""
    lines = []
    for item in error.errors():
        path, known = _follow(model, item["loc"])
        at = ".".join(filter(None, [where, *path]))
        nested = item.get("ctx", {}).get("error")
        if isinstance(nested, ConfigError):
            lines.extend(f"{at}.{line}" if at else line for line in str(nested).splitlines())
        else:
            message = _message(item, known, path)
            lines.append(f"{at}: {message}" if at else message)
    return "\n".join(lines)


def _message(item: dict, known: list[str], path: list[str]) -> str:
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], known, n=1)
        return "unknown field" + (
            f", did you mean {near[0]!r}?" if near else f"; known fields: {', '.join(sorted(known))}"
        )
    if item["type"] == "missing":
        return "this field is required"
    if item["type"].startswith("union_tag"):
        tags, got = item["ctx"].get("expected_tags", ""), item["ctx"].get("tag")
        if got is None:
            return f"needs a field 'type', one of {tags}"
        near = difflib.get_close_matches(shown(got), [tag.strip(" '") for tag in tags.split(",")], n=1)
        return f"type {shown(got)} is not one of {tags}" + (f", did you mean {near[0]!r}?" if near else "")
    if item["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", item["msg"])
        near = difflib.get_close_matches(shown(item["input"]).strip("'"), choices, n=1)
        return f"{item['msg']} (got {shown(item['input'])})" + (
            f", did you mean {near[0]!r}?" if near else ""
        )
    got = "" if isinstance(item["input"], dict) else f" (got {shown(item['input'])})"
    return item["msg"].removeprefix("Value error, ") + got


def _follow(model: Any, loc: tuple) -> tuple[list[str], list[str]]:
    """Walk an error's location through the annotations: the path a user wrote, and the known names beside
    its last part. Tags of discriminated unions stand in `loc` but not in the user's file."""
    path, known, here = [], [], model
    for key in loc:
        here = _bare(here)
        tagged = [m for m in here if _tag(m) == key]
        if len(here) > 1 and tagged:
            here = tagged[0]
            continue
        choice = next((m for m in here if _has(m, key)), here[0] if here else None)
        known = list(choice.model_fields) if _is_model(choice) else []
        path.append(str(key))
        here = _child(choice, key)
    return path, known


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def _bare(kind: Any) -> list[Any]:
    """The members of a union without None and annotations; a single type as a list of one."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _bare(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(kind) if arg is not type(None) for m in _bare(arg)]
    return [kind]


def _tag(kind: Any) -> str | None:
    if not _is_model(kind) or "type" not in kind.model_fields:
        return None
    return kind.model_fields["type"].default


def _has(kind: Any, key: Any) -> bool:
    return _is_model(kind) and key in kind.model_fields


def _child(kind: Any, key: Any) -> Any:
    """The annotation of a field, of a mapping's value or of a list's item."""
    if _has(kind, key):
        return kind.model_fields[key].annotation
    arguments = typing.get_args(kind)
    return arguments[-1] if arguments and not _is_model(kind) else kind
