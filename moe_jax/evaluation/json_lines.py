"""Files of items, one JSON object per line."""

import json
import pathlib
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

from moe_jax import strict_json

Item = TypeVar("Item")
MAX_LINE = 4_000_000  # bytes


def read(path: str | pathlib.Path, parse: Callable[[dict[str, Any]], Item]) -> list[Item]:
    """The items of a file, in its order; empty lines are left out.

    Raises: ValueError, with the path and the line's number, for a line that is no JSON object in
      UTF-8 or longer than `MAX_LINE`, or that `parse` refuses with a ValueError, and for a file
      without items.
    """
    path, items = pathlib.Path(path), []
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if not line.strip():
                continue
            try:
                items.append(parse(_object(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} has no lines; write a JSON object in each")
    return items


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise ValueError(f"it has more than {MAX_LINE:,} bytes; divide or remove it")
    try:
        values = strict_json.parse(line.decode("utf-8-sig"))  # some editors write a BOM
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise ValueError(f"it is not JSON ({problem}); write one JSON object per line") from None
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def text(values: dict[str, Any], name: str, default: str | None = None) -> str:
    """The text at a key. Raises: ValueError if it is absent without a default, or no text."""
    value = values.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text, not {reprlib.repr(value)}")
    return value


def texts(values: dict[str, Any], name: str, least: int) -> tuple[str, ...]:
    """The list of texts at a key. Raises: ValueError for anything else, or fewer than `least`."""
    value = values.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name!r} must be a list of texts, not {reprlib.repr(value)}")
    if len(value) < least:
        raise ValueError(f"{name!r} has {len(value)} texts; give at least {least}")
    return tuple(value)
