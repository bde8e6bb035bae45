"""Writes a run's metrics to metrics.jsonl and TensorBoard, and reads them back."""

import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tensorboardX

from moe_jax import files
from moe_jax.parallel import distributed


@contextlib.contextmanager
def writer(workdir: pathlib.Path, *, resume_step: int) -> Iterator[Callable[[dict], None]]:
    """A function that appends a row to <workdir>/metrics.jsonl and its scalars to TensorBoard.

    A row has `step`; its values are numbers, arrays, text, or dicts of these. Numbers that are not
    finite become null, because JSON cannot express them. In all processes but the first the
    function does nothing. Before it returns, rows that the run will write again are removed: those
    of steps after the checkpoint at `resume_step`, and the evaluators' rows of that step itself.
    """
    if not distributed.is_first():
        yield lambda row: None
        return
    path = workdir / "metrics.jsonl"
    kept = [row for row in read(path) if _is_before(row, resume_step)] if resume_step else []
    files.write_text(path, "".join(_line(row) for row in kept))
    folder = str(workdir / "tensorboard")
    board = tensorboardX.SummaryWriter(folder, purge_step=resume_step or None)
    with open(path, "a", encoding="utf-8") as jsonl, board:

        def write(row: dict) -> None:
            plain = _plain(row)
            jsonl.write(_line(plain))
            jsonl.flush()
            try:
                for name, value in _scalars(plain):
                    board.add_scalar(name, value, row["step"])
                board.flush()
            except OSError as error:  # not worth ending a run: metrics.jsonl has the same numbers
                print(f"TensorBoard: {error}", file=sys.stderr)

        yield write


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl, without an incomplete last line from a killed run."""
    if not path.exists():
        return []
    # `splitlines` would also split at Unicode line separators, which JSON text may contain.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _is_before(row: dict, step: int) -> bool:
    return row["step"] < step or (row["step"] == step and "loss" in row)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | np.ndarray | jax.Array) and np.ndim(value):
        return [_plain(v) for v in value]
    value = np.asarray(value)
    if np.issubdtype(value.dtype, np.floating):
        # `str` gives the shortest text that reads back as the same float32 or float64.
        number = float(str(value))
        return number if math.isfinite(number) else None
    return value.item()


def _scalars(row: dict, prefix: str = ""):
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            yield prefix + name, value
