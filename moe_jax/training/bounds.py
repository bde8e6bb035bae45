"""The description of a checkpoint of a stranger: its form, and its sizes beside those of its files.

A checkpoint's files are compressed and may leave out parts of an array, so that a small folder can
describe arrays larger than the memory.
"""

import math
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from moe_jax import strict_json
from moe_jax.data import shares
from moe_jax.training import goodput

# Without values a checkpoint of 250 MB is small enough to read. Weights compress at most 2 to 3
# times; Adam's moments are zeros in parts that are not trained.
MANY_BYTES, MOST_COMPRESSED = 250_000_000, 50


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e300


def _is_size_or_unknown(value: object) -> bool:
    return value is None or _is_size(value)


def _is_list(value: object, is_element: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_element, value))


def _are_pairs(value: object) -> bool:
    return _is_list(value, lambda pair: _is_list(pair, _is_count) and len(pair) == 2)


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(of_split, dict) and all(map(_is_count, of_split.values()))
        for of_split in value.values()
    )


def _are_losses(value: object) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch("[0-9]{1,18}", step) and isinstance(loss, int | float) and abs(loss) < 1e300
        for step, loss in value.items()
    )


def _is_lineage(value: object) -> bool:
    match value:
        case {"parents": parents, **numbers}:
            runs = numbers.get("runs", {})  # older versions kept the sums only
            every = [numbers, *runs.values()] if isinstance(runs, dict) else [None]
            are_names = _is_list(parents, lambda name: isinstance(name, str))
            return are_names and all(map(_are_spent, every))
    return False


def _are_spent(numbers: object) -> bool:
    match numbers:
        case {"tokens": tokens, "training_flops": training_flops, **rest}:
            is_known = _is_size_or_unknown(rest.get("device_seconds"))
            return _is_count(tokens) and _is_size(training_flops) and is_known
    return False


def _are_stages(value: object) -> bool:
    def is_stage(stage: Any) -> bool:
        try:
            return bool(shares.Stage.of_json(stage))
        except ValueError:
            return False

    return _is_list(value, is_stage)


# The forms of the values that a run keeps in its checkpoints besides the state, `data`. A model
# that was imported has only the step.
FORMS: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "resumed_from": _is_count,
    "skipped_steps": _is_count,
    "device_seconds": _is_size_or_unknown,
    "spent": lambda value: isinstance(value, dict) and goodput.are_seconds(value),
    "left_out": _are_pairs,
    "losses": _are_losses,
    "lineage": _is_lineage,
    "text": _are_texts,
    "skipped_records": lambda value: value is None or _are_counts(value),
    "mixture": _are_stages,
    "versions": _are_texts,
}


def check_form(meta: object) -> None:
    """Raises: ValueError for a description that `checkpoint.start` could not have written."""
    strict_json.check_encodable(meta)
    match meta:
        case {"data": dict() as data, "config": dict(), "leaves": dict() as leaves, "digests": d}:
            pass
        case _:
            raise ValueError("its description lacks data, config, leaves or digests")
    if not isinstance(d, dict) or d.keys() != leaves.keys():
        raise ValueError("its description has digests of other leaves")
    for name in {"step": None, **data}:
        if name in FORMS and not FORMS[name](data.get(name)):
            raise ValueError(f"its description has the {name} {reprlib.repr(data.get(name))}")
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
