"""metrics.jsonl, TensorBoard and the progress bar."""

import json
import math
import pathlib
import sys

import jax
import numpy as np
import tensorboardX
import tqdm

from moe_jax import files
from moe_jax.parallel import distributed


class MetricsWriter:
    """Appends rows to <workdir>/metrics.jsonl, one JSON object a line, and scalars to TensorBoard.

    On construction the rows that the run will write again are removed: after a restart from a
    checkpoint at `resume_step` those of later steps, and the evaluators' of that step itself.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int):
        path = workdir / "metrics.jsonl"
        kept = [row for row in read(path) if _is_before(row, resume_step)] if resume_step else []
        files.write_text(path, "".join(_line(row) for row in kept))
        self._jsonl = open(path, "a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step or None
        )

    def write(self, row: dict) -> None:
        """`row` has `step`; values are numbers, arrays, text, or dicts of these.

        Numbers that are not finite become null, for JSON has no others.
        """
        plain = _plain(row)
        self._jsonl.write(_line(plain))
        self._jsonl.flush()
        try:
            for name, value in _scalars(plain):
                self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()
        except OSError as error:  # a second copy of what is in metrics.jsonl: not worth a run
            print(f"TensorBoard: {error}", file=sys.stderr)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._jsonl.close()
        self._tensorboard.close()


class NoMetrics:
    """In the place of a writer, in the processes beside the first."""

    def write(self, row: dict) -> None:
        pass

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_) -> None:
        pass


def writer(workdir: pathlib.Path, *, resume_step: int) -> MetricsWriter | NoMetrics:
    """Process 0 writes for all."""
    if distributed.is_first():
        return MetricsWriter(workdir, resume_step=resume_step)
    return NoMetrics()


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def progress(*, total: int, initial: int) -> tqdm.tqdm:
    """A bar of steps with the time left, of process 0; silent unless stderr is a terminal."""
    silent = None if distributed.is_first() else True
    return tqdm.tqdm(total=total, initial=initial, unit="step", disable=silent, dynamic_ncols=True)


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
        # The shortest text that reads back as the same float32 or float64.
        number = float(str(value))
        return number if math.isfinite(number) else None
    return value.item()


def _scalars(row: dict, prefix: str = ""):
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            yield prefix + name, value
