"""Writes a run's metrics to metrics.jsonl and TensorBoard, and reads them back."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator

from moe_jax import files, strict_json
from moe_jax.parallel import distributed
from moe_jax.training import board


@contextlib.contextmanager
def writer(workdir: pathlib.Path, *, resume_step: int) -> Iterator[Callable[[dict], None]]:
    """A function that appends a row to <workdir>/metrics.jsonl and its scalars to TensorBoard.

    A row has `step`; its values are numbers, arrays, text, or dicts of these. Numbers that are not
    finite become null, because JSON cannot express them. In all processes but the first the
    function does nothing. Before the function is handed out, rows that the run will write again are
    removed: those of steps after the checkpoint at `resume_step`, and the evaluators' rows of that
    step itself. A file with a damaged line is kept under another name; its other lines are used.
    """
    if not distributed.is_first():
        yield lambda row: None
        return
    path = workdir / "metrics.jsonl"
    rows, damaged = _rows(path)
    if damaged:
        aside = files.set_aside(path, "damaged")
        distributed.say(f"{damaged[0]}: the file is kept as {aside.name}, the other lines go on")
    kept = [row for row in rows if _is_before(row, resume_step)] if resume_step else []
    files.write_text(path, "".join(_line(row) for row in kept))
    shown = board.Board(workdir / "tensorboard", resume_step or None)
    try:
        with open(path, "a", encoding="utf-8") as jsonl:

            def write(row: dict) -> None:
                values = strict_json.plain(row)
                jsonl.write(_line(values))
                jsonl.flush()
                shown.add(row["step"], dict(_scalars(values)))

            yield write
    finally:
        shown.close()


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl, without an incomplete last line from a killed run.

    Raises: ValueError for a damaged line.
    """
    rows, damaged = _rows(path)
    if damaged:
        raise ValueError(f"{damaged[0]}; remove the line")
    return rows


def _rows(path: pathlib.Path) -> tuple[list[dict], list[str]]:
    """The rows, and a message for each line that is not a row."""
    if not path.exists():
        return [], []
    rows, damaged = [], []
    # `splitlines` would also split at Unicode line separators, which JSON text may contain.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = strict_json.parse(line.decode())
            if type(row["step"]) is not int:
                raise ValueError("its step is no whole number")
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            damaged.append(f"{path}, line {number}, is damaged ({error!r})"[:300])
    return rows, damaged


def _is_before(row: dict, step: int) -> bool:
    return row["step"] < step or (row["step"] == step and "loss" in row)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _scalars(row: dict, prefix: str = ""):
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            yield prefix + name, value
