"""Files of items, one JSON object per line."""

import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from moe_jax import strict_json

Item = TypeVar("Item")


def read(path: str | pathlib.Path, parse: Callable[[dict[str, Any]], Item]) -> list[Item]:
    """The items of a file, in its order; empty lines are left out.

    Raises: ValueError, with the path and the line's number, for a line that is no JSON object or
      that `parse` refuses with a ValueError, and for a file without items.
    """
    path, items = pathlib.Path(path), []
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = strict_json.parse(line)
                if not isinstance(values, dict):
                    raise ValueError("it is not a JSON object")
                items.append(parse(values))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} has no items")
    return items


def text(values: dict[str, Any], name: str, default: str | None = None) -> str:
    """The text at a key. Raises: ValueError if it is absent without a default, or no text."""
    value = values.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text, not {value!r}")
    return value


def texts(values: dict[str, Any], name: str, least: int) -> tuple[str, ...]:
    """The list of texts at a key. Raises: ValueError for anything else, or fewer than `least`."""
    value = values.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name!r} must be a list of texts, not {value!r}")
    if len(value) < least:
        raise ValueError(f"{name!r} has {len(value)} texts; give at least {least}")
    return tuple(value)
