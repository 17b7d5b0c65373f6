"""What every config of the project shares: strict pydantic models and errors that name the field.

A config is one object in three places: the Python argument, the YAML block and the saved
`memory_config.json`. Unknown keys, wrong types and out-of-range values raise `ConfigError`, whose message
starts with the dotted path of the field and, for a misspelt key, ends with the nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, TypeVar

import pydantic


class ConfigError(ValueError):
    """A config that cannot be used. The message starts with the dotted path of the field."""


class Strict(pydantic.BaseModel):
    """Base of every config: unknown keys are errors, values are never coerced, objects are frozen.

    Raises:
        ConfigError: on construction with an unknown field, a wrong type or a value out of range.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def __init__(self, **data: Any):
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
    if isinstance(model, type) and issubclass(model, Strict) and not isinstance(data, dict):
        raise ConfigError(f"{where or 'config'}: expected a mapping of fields, got {type(data).__name__}")
    try:
        return pydantic.TypeAdapter(model).validate_python(data)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, model, where)) from None


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
        near = difflib.get_close_matches(str(got), [tag.strip(" '") for tag in tags.split(",")], n=1)
        return f"type {got!r} is not one of {tags}" + (f", did you mean {near[0]!r}?" if near else "")
    shown = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    return item["msg"].removeprefix("Value error, ") + shown


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
