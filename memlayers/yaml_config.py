"""YAML files as strict configs, with overrides from the command line: shared by training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from memlayers.config import ConfigError, check_plain, shown, validate

Model = TypeVar("Model")

MOST_BYTES = 2**20
"""Of a config file. What its anchors stand for is bounded by `check_plain`, which counts values at each place."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `2e-3` is a number (not a string), and a key given twice is an error. Merge keys (`<<`) are
    refused: a page of them can stand for more fields than memory holds."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in getattr(node, "value", ()):
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not taken, write the fields out", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} is no text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

NO_VALUE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What yaml raises beside its own errors, for a value that its tag does not fit: `2024-99-99`, `!!bool x`, a whole number
of 5,000 digits."""


def load_yaml(path: str | Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """Reads a YAML file, applies overrides such as `optimizer.lr=2e-3`, and checks the result.

    path: the file. overrides: "key.sub=value", later ones win; the value is read as YAML; a number as a key
    counts into a list. model: a `memlayers.config.Strict` class.
    Raises `FileNotFoundError`, or `ConfigError` whose message starts with the path of the field.
    """
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    return validate(model, data)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises `FileNotFoundError`; `ConfigError` that names the file for one that cannot be read, is no UTF-8, has more than
    MOST_BYTES, or holds anything but a mapping of plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {str(path)!r}.")
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if len(raw) > MOST_BYTES:
        raise ConfigError(f"{path}: has more than {MOST_BYTES:,} bytes, too many for a config file.")
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config file holds `key: value` lines, this one holds {shown(data)}.")
    check_plain(data)
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one "key.sub=value" in `data`, in place; mappings on the way are made where they are missing.

    Raises `ConfigError` when there is no "=", or when the path runs through a value that is no mapping or
    list.
    """
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{shown(override)}: an override is written key.sub=value, for example optimizer.lr=2e-3."
        )
    check_plain(keys, "override")
    here: Any = data
    for depth, key in enumerate(keys):
        where = ".".join(keys[: depth + 1])
        if isinstance(here, list):
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(here):
                raise ConfigError(
                    f"{where}: {shown(key)} is no place in a list of {len(here)} (counted from 0)."
                )
            key = int(key)
        elif not isinstance(here, dict):
            raise ConfigError(
                f"{where}: {'.'.join(keys[:depth])} is {shown(here)}, which has no fields to set."
            )
        if depth == len(keys) - 1:
            here[key] = parse_yaml(value, path)
        elif isinstance(here, dict) and here.get(key) is None:
            here = here.setdefault(key, {}) if key not in here else _replace(here, key)
        else:
            here = here[key]


def _replace(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    mapping[key] = {}
    return mapping[key]


def parse_yaml(text: str, where: str) -> Any:
    """Any YAML value. Raises `ConfigError` that starts with `where` and gives the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: it is nested too deep.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        told = str(getattr(error, "problem", None) or error)
    except NO_VALUE as error:
        place, told = "", f"a value that does not fit its tag ({type(error).__name__}: {error!s:.200})"
    told = told.encode("utf-8", "backslashreplace").decode()
    raise ConfigError(f"{where}: not valid YAML{place}: {told}.")
