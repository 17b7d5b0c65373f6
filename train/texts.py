"""Reading text files and JSON lines, and texts as token ids: bad files are named with their line, long ones read in parts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlayers.config import ConfigError, shown
from memlayers.files import DamagedFile, read_text

MOST_BYTES = 10_000_000
"""Of a JSON line; no more of it is read."""
PIECE = 1_000_000
"""Characters that are tokenised at a time: a tokenizer takes hundreds of bytes for each."""


def read_file(path: str) -> str:
    """The text of a file. Raises ConfigError where it is no UTF-8 or empty."""
    try:
        text = read_text(path)
    except DamagedFile as error:
        raise ConfigError(f"data.files: {error}") from None
    if not text.strip():
        raise ConfigError(f"data.files: {path} is empty")
    return text


def read_jsonl(paths: list[str]) -> list[dict[str, str]]:
    """The lines of files: all with `text`, or all with `context`, `question` and `answer`, which are strings.

    Raises:
        ConfigError: anything else; names the file and the line.
    """
    lines = []
    for path in paths:
        before = len(lines)
        for number, raw in _raw_lines(path):
            where = f"data.files: {path}, line {number}"
            line = _fields(_parse(raw, where), where)
            if lines and lines[0].keys() != line.keys():
                raise ConfigError(
                    f"{where} has other fields than the first line of {paths[0]}; keep one kind"
                )
            lines.append(line)
        if len(lines) == before:
            raise ConfigError(f"data.files: {path} is empty")
    return lines


def _raw_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers. Only `\\n` ends a line: JSON may hold what else looks like an end."""
    with Path(path).open("rb") as file:
        number = 0
        while raw := file.readline(MOST_BYTES + 1):
            number += 1
            where = f"data.files: {path}, line {number}"
            if len(raw) > MOST_BYTES:
                raise ConfigError(
                    f"{where} has more than {MOST_BYTES:,} bytes; cut its text into several lines"
                )
            try:
                line = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{where} is not UTF-8 text ({error.reason} at byte {error.start})"
                ) from None
            if line.strip():
                yield number, line


def _parse(raw: str, where: str) -> Any:
    try:
        return json.loads(raw, parse_constant=_no_number)
    except RecursionError:
        raise ConfigError(f"{where} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error})") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _fields(line: Any, where: str) -> dict[str, str]:
    fields = ["text"] if isinstance(line, dict) and "text" in line else ["context", "question", "answer"]
    if not isinstance(line, dict) or not all(isinstance(line.get(f), str) and line[f] for f in fields):
        raise ConfigError(f"{where} needs the field text, or context, question and answer, as strings")
    for field in fields:
        if any("\ud800" <= character <= "\udfff" for character in line[field]):
            raise ConfigError(
                f"{where} has half of a character in {field} (an escape \\ud800 to \\udfff alone)"
            )
    return {field: line[field] for field in fields}


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens of a whole text, with the tokenizer's BOS, and EOS where it has one. A long text is cut at white space.

    Raises:
        ConfigError: no text, but what else a column of a dataset may hold.
    """
    if not isinstance(text, str):
        raise ConfigError(f"data.text_field: a row holds {shown(text)}, which is no text")
    first, *others = _pieces(text)
    ids, end = tokenizer(first, verbose=False)["input_ids"], tokenizer.eos_token_id
    for piece in others:
        ids = ids[:-1] if ids and ids[-1] == end else ids
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    if end is not None and (not ids or ids[-1] != end):
        ids = [*ids, end]
    return ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = max(text.rfind(space, start + 1, start + PIECE) for space in " \n")
        end = start + PIECE if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]
