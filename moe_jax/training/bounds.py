"""The description of a checkpoint of a stranger: its form, and its sizes beside those of its files.

A checkpoint's files are compressed and may leave out parts of an array, so that a small folder can
describe arrays larger than the memory.
"""

import math
import pathlib
from collections.abc import Iterable

import jax.numpy as jnp

# Without values a checkpoint of 250 MB is small enough to read. Weights compress at most 2 to 3
# times; Adam's moments are zeros in parts that are not trained.
MANY_BYTES, MOST_COMPRESSED = 250_000_000, 50


def check_form(meta: object) -> None:
    """Raises: ValueError for a description that `checkpoint.start` could not have written."""
    match meta:
        case {"data": dict() as data, "config": dict(), "leaves": dict() as leaves, "digests": d}:
            pass
        case _:
            raise ValueError("its description lacks data, config, leaves or digests")
    if not isinstance(d, dict) or d.keys() != leaves.keys():
        raise ValueError("its description has digests of other leaves")
    if type(data.get("step")) is not int:
        raise ValueError(f"its description has the step {data.get('step')!r}")
    for path, leaf in leaves.items():
        match leaf:
            case [[*shape], str() as dtype] if all(type(n) is int and n >= 0 for n in shape):
                try:
                    jnp.dtype(dtype)
                except TypeError:
                    raise ValueError(f"its leaf {path} has no dtype {dtype!r}") from None
            case _:
                raise ValueError(f"its leaf {path} is no shape and dtype")
        if type(d[path]) is not int:
            raise ValueError(f"its leaf {path} has no digest")


def check_size(folder: pathlib.Path, leaves: Iterable[tuple[list[int], str]]) -> None:
    """Raises: ValueError for leaves that need much more memory than the folder has bytes."""
    declared = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in leaves)
    stored = sum(path.lstat().st_size for path in pathlib.Path(folder).rglob("*"))
    if declared > MANY_BYTES + MOST_COMPRESSED * stored:
        raise ValueError(
            f"its leaves would take {declared:,} bytes of memory, but its files have {stored:,}: "
            "it is damaged or was made to exhaust the memory"
        )
