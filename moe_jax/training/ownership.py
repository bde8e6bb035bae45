"""A run's workdir and its checkpoints know each other, so that neither is taken for another run's.

<workdir>/saved.json has the id of the run and, once a checkpoint is saved, the folder of it. A
folder outside of the workdir, by `checkpoint.directory`, has owner.json with the same id. Neither
depends on where the two lie, so both may be moved or copied together.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import uuid
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from moe_jax import files, stopping, strict_json, untrusted
from moe_jax.config import ConfigError, checks, environment
from moe_jax.parallel import distributed
from moe_jax.training import checkpoint, metrics

NOTE, OWNER, LOCK = "saved.json", "owner.json", ".owner.lock"


class Ownership:
    """Process 0 looks and writes; in other processes `check` and `check_owner` do nothing."""

    def __init__(self, workdir: pathlib.Path, directory: epath.Path, config: ConfigDict):
        self._workdir, self._directory, self._config = workdir, directory, config
        self._outside = directory != epath.Path(workdir) / "checkpoints"
        self._id = ""

    def check(self) -> bool:
        """True if there are checkpoints. It writes nothing.

        Raises: ConfigError if the run had saved checkpoints and none is there, if they are of
          another run, or if something is in the way of saves.
        """
        there_are = bool(checkpoint.steps(self._directory))
        if not distributed.is_first():
            return there_are
        note = self._note()
        if not files.is_remote(self._directory):
            there = files.nearest(path := pathlib.Path(self._directory).absolute())
            if (self._outside or there == path) and not there.is_dir():
                raise ConfigError(f"{there} is no folder for checkpoints; move it away")
        if there_are:
            is_ours = not self._outside or self._owner() in ("", note.get("id"))
            if not (is_ours or (not note and self._are_of_this_config())):
                raise ConfigError(
                    f"the checkpoints in {self._directory} are those of another run; set another "
                    "config.checkpoint.directory or name of the --workdir, or remove "
                    f"{self._directory / OWNER} if they are of this run"
                )
        elif (where := self._saved_before(note)) is not None:
            raise ConfigError(
                f"{self._directory} has no checkpoint, but the run in --workdir={self._workdir} "
                f"has saved some{where and f', in {where}'}; mount or restore that folder, set "
                "config.checkpoint.directory as it was, or move the workdir away to begin anew"
            )
        with checks.refusing():
            checkpoint.check_unfinished(self._directory)
        return there_are

    def _are_of_this_config(self) -> bool:
        """True in a workdir in which no run has begun, if they are of a run that would be equal."""
        if (self._workdir / "config.json").exists():
            return False
        newest = max(checkpoint.steps(self._directory))
        try:
            config = checkpoint.described(self._directory / str(newest))["config"]
            return not environment.changes(config, self._config)
        except Exception as error:  # damaged files make Orbax and TensorStore raise any type
            stopping.pass_on(error)
            return False

    def claim(self, saved: bool) -> contextlib.ExitStack:
        """Makes the folder this run's, removes what saves that were killed have left in it, and
        locks it, if it is on this machine, until closed.

        `saved`: the run goes on from a checkpoint in it.

        Raises: ConfigError, like `check` and for a folder that another run is using; OSError.
        """
        with contextlib.ExitStack() as held:
            if self._outside and not files.is_remote(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(pathlib.Path(self._directory)))
            self.check()  # again: another run may have begun and ended meanwhile
            self._id = self._note().get("id") or uuid.uuid4().hex[:12]
            self._write_note(self._note().get("checkpoints", ""))
            if self._outside and (owner := self._owner()) != self._id:
                if owner:
                    distributed.say(
                        f"the checkpoints in {self._directory} are those of a run with this config "
                        "and another --workdir, which was lost with its machine: they are taken"
                    )
                _write(self._directory / OWNER, {"id": self._id})
            if saved:
                self.saved()
            checkpoint.remove_unfinished(self._directory)
            return held.pop_all()

    def saved(self) -> None:
        """Notes that a checkpoint of the run is in the folder."""
        directory = os.fspath(self._directory)
        self._write_note(
            directory if files.is_remote(self._directory) else os.path.abspath(directory)
        )

    def check_owner(self) -> None:
        """Raises: ConfigError if another run has begun to use the folder, as in a bucket, which
        cannot be locked."""
        if not (distributed.is_first() and self._outside):
            return
        if not (owner := self._owner()):
            raise ConfigError(
                f"{self._directory / OWNER} is gone; mount or restore the folder, and run again"
            )
        if owner != self._id:
            raise ConfigError(
                f"another run is using {self._directory}; set another config.checkpoint.directory "
                "or name of the --workdir"
            )

    def _note(self) -> dict[str, Any]:
        path = self._workdir / NOTE
        if not path.exists():
            return {}
        with contextlib.suppress(ValueError):
            match note := strict_json.read_object(path):
                case {"id": str() as name, "checkpoints": str()} if _is_id(name):
                    return note
        raise ConfigError(f"{path} is damaged; remove it if the checkpoints are of this run")

    def _write_note(self, directory: str) -> None:
        note = {"id": self._id, "checkpoints": directory}
        if note != self._note():
            _write(self._workdir / NOTE, note)

    def _owner(self) -> str:
        """The id of the run that the folder belongs to; "" if it belongs to none."""
        path = self._directory / OWNER
        try:
            if not files.is_remote(path):
                found: Any = strict_json.read_object(pathlib.Path(path))
            else:
                found = strict_json.parse(path.read_text())
            return found["id"] if _is_id(found["id"]) else "damaged"
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError, TypeError):
            return "damaged"

    def _saved_before(self, note: dict[str, Any]) -> str | None:
        """None for a run that has saved no checkpoint; otherwise where it did, or "" if unknown.

        A run of an earlier version has no note. It has saved one if it has a result or a row of a
        step whose checkpoint waited for the one before it.
        """
        if note:
            return untrusted.line(note["checkpoints"]) or None
        if self._outside and files.numbered(inside := self._workdir / "checkpoints"):
            return str(inside)
        last = metrics.last_step(self._workdir / "metrics.jsonl")
        waited = last > 2 * self._config.checkpoint.every_steps
        return "" if waited or (self._workdir / "result.json").exists() else None


def _is_id(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{12}", text) is not None


def _write(path: pathlib.Path, values: dict[str, str]) -> None:
    text = strict_json.text(values) + "\n"
    if files.is_remote(path):  # an object appears whole
        path.write_text(text)
    else:
        files.write_text(pathlib.Path(path), text)


@contextlib.contextmanager
def _locked(directory: pathlib.Path):
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(directory / LOCK, flags, 0o666), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run is using {directory}; set another config.checkpoint.directory or "
                "name of the --workdir, or wait"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
