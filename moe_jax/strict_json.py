"""JSON as its standard defines it: numbers that are not finite become null."""

import json
import math
import pathlib
from typing import Any

import numpy as np


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
    """The object in a file. Raises: ValueError, with the path, for a file of anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a BOM
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values
