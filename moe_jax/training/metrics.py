"""Writes a run's metrics to metrics.jsonl and to back ends, and reads them back."""

import contextlib
import io
import json
import pathlib
from collections.abc import Iterator, Sequence

from moe_jax import files, strict_json
from moe_jax.parallel import distributed
from moe_jax.training import backends


class Writer:
    """Appends a row to metrics.jsonl, and its scalars to the back ends, at each call.

    A row has `step`; its values are numbers, arrays, text, or dicts of these. Numbers that are not
    finite become null, because JSON cannot express them. Rows that a full disk does not take wait
    in memory, and each further row tries them again: `check` ends the run if they still wait.
    Without a file, as in all processes but the first, it does nothing.
    """

    def __init__(self, jsonl: io.RawIOBase | None, shown: Sequence[backends.Writer] = ()):
        self._jsonl, self._shown = jsonl, shown
        self._waiting, self._fault = b"", ""

    def __call__(self, row: dict) -> None:
        if self._jsonl is None:
            return
        values = strict_json.plain(row)
        self._waiting += _line(values).encode()
        self._write()
        for writer in self._shown:
            writer.add(row["step"], dict(_scalars(values)))

    def check(self) -> None:
        """Raises: OSError if rows still cannot be written."""
        self._write()
        if self._waiting:
            raise OSError(
                f"metrics.jsonl cannot be written ({self._fault}), it lacks "
                f"{self._waiting.count(10)} rows up to the last checkpoint; make room and run "
                "again: it goes on from there"
            )

    def _write(self) -> None:
        try:
            while self._jsonl is not None and self._waiting:
                # A part of a row may fit: the reader leaves out a last line without its end.
                self._waiting = self._waiting[self._jsonl.write(self._waiting) :]
        except OSError as error:
            if not self._fault:
                distributed.say(
                    f"metrics.jsonl cannot be written ({error}): the run ends after its next "
                    "checkpoint unless there is room by then"
                )
            self._fault = str(error)


@contextlib.contextmanager
def writer(
    workdir: pathlib.Path, *, resume_step: int, log_to: Sequence[str] = ()
) -> Iterator[Writer]:
    """A `Writer` for <workdir>/metrics.jsonl and the back ends of these names.

    Before the writer is handed out, rows that the run will write again are removed: those of steps
    after the checkpoint at `resume_step`, and the evaluators' rows of that step itself. A file with
    a damaged line is kept under another name; its other lines are used.

    Raises: OSError at the end if rows could not be written.
    """
    if not distributed.is_first():
        yield Writer(None)
        return
    path = workdir / "metrics.jsonl"
    rows, damaged = _rows(path)
    if damaged:
        aside = files.set_aside(path, "damaged")
        distributed.say(f"{damaged[0]}: the file is kept as {aside.name}, the other lines go on")
    kept = [row for row in rows if _is_before(row, resume_step)] if resume_step else []
    files.write_text(path, "".join(_line(row) for row in kept))
    shown = [backends.Writer(name, workdir, resume_step) for name in log_to]
    try:
        with open(path, "ab", buffering=0) as jsonl:
            write = Writer(jsonl, shown)
            yield write
            write.check()
    finally:
        backends.close(shown)


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl, without an incomplete last line from a killed run.

    Raises: ValueError for a damaged line.
    """
    rows, damaged = _rows(path)
    if damaged:
        raise ValueError(f"{damaged[0]}; remove the line")
    return rows


def last_step(path: pathlib.Path) -> int:
    """The largest step in a metrics.jsonl, which may be damaged or missing; 0 if there is none."""
    rows, _ = _rows(path) if path.is_file() else ([], [])
    return max((row["step"] for row in rows), default=0)


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
