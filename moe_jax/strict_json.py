"""JSON as its standard defines it: numbers that are not finite become null."""

import collections
import json
import math
import pathlib
import re
import reprlib
import stat
from typing import Any

import numpy as np

MAX_BYTES = 100_000_000  # a tokenizer.json of a million pieces has 60 MB


def plain(value: Any) -> Any:
    """The value of dicts, sequences, arrays, text and numbers in a form that JSON can hold."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) or np.ndim(value):
        return [plain(inner) for inner in value]
    value = np.asarray(value)
    if np.issubdtype(value.dtype, np.floating):
        # `str` gives the shortest text that reads back as the same float32 or float64.
        number = float(str(value))
        return number if math.isfinite(number) else None
    return value.item()


def text(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file.

    Raises: ValueError, with the path, for a file of anything else, one that is no regular file or
      too large, or an object that has a key twice.
    """
    if not stat.S_ISREG((found := path.stat()).st_mode):
        raise ValueError(f"{path} is not a regular file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"{path} has {found.st_size:,} bytes; JSON is read up to {MAX_BYTES:,}")
    try:
        values = parse(path.read_text(encoding="utf-8-sig"))  # some editors write a BOM
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises: ValueError, also for a text nested too deeply, for a number that is not finite, and for
      half a surrogate pair: `text` could not write them, nor would other readers take them.
    """
    how: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_unique, **how)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # without such an escape there is no surrogate
            check_encodable(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def check_encodable(value: Any) -> None:
    """Raises: ValueError if a text in `value` has half a surrogate pair, which UTF-8 lacks."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half a surrogate pair") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{reprlib.repr(text)} is not a finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{reprlib.repr(twice)} is in an object twice")
    return unique
