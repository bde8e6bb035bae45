"""JSON as its standard defines it: numbers that are not finite become null."""

import json
import math
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
