"""Atomic writes: a file or folder is written under a temporary name next to it, then renamed.

A path in a bucket is an `etils.epath.Path`, which has the methods of a pathlib.Path used here.
"""

import contextlib
import fcntl
import itertools
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator

NUMBER = "0|[1-9][0-9]*"  # as str(int) writes it


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path that becomes `path` at the end, and is deleted if anything is raised."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # it may be a link, which would be written through
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def is_remote(path: pathlib.Path) -> bool:
    """True for a path in a bucket."""
    return "://" in os.fspath(path)


def is_there(path: pathlib.Path) -> bool:
    """True for a file, a folder or a link, even one that leads nowhere."""
    return path.exists() or os.path.islink(path)


def numbered(directory: pathlib.Path) -> list[int]:
    """The folders inside that have a number for a name, ascending; links are no folders."""
    inside = directory.iterdir() if directory.is_dir() else ()
    named = (path for path in inside if re.fullmatch(NUMBER, path.name))
    return sorted(int(path.name) for path in named if path.is_dir() and not os.path.islink(path))


def set_aside(path: pathlib.Path, why: str) -> pathlib.Path:
    """Renames a file or folder by adding ".WHY-1", or the first number that is free."""
    names = (path.with_name(f"{path.name}.{why}-{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not is_there(name)))


@contextlib.contextmanager
def whole_folder(folder: str | pathlib.Path, *, shared: bool = False) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes `folder` at the end, and is deleted if anything is raised.

    Args:
      shared: another process may be writing the same folder; the first one finished is kept.

    Raises: ValueError if `folder` exists and is not shared, unless it is empty.
    """
    folder = pathlib.Path(folder)
    if not shared and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; choose another output or remove it")
    unfinished = folder.with_name(f".{folder.name}.unfinished-{uuid.uuid4().hex[:12]}")
    unfinished.mkdir(parents=True)  # with the umask's permissions, unlike mkdtemp
    try:
        yield unfinished
        try:
            unfinished.replace(folder)
        except OSError:
            if not (shared and folder.exists()):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_folder(folder: pathlib.Path) -> None:
    """Removes a folder that other processes may be removing or making at the same time."""
    gone = folder.with_name(f".{folder.name}.removed-{uuid.uuid4().hex[:12]}")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder.rename(gone))


@contextlib.contextmanager
def alone(lock: pathlib.Path) -> Iterator[None]:
    """Waits until no other process on this machine is in such a block with the same lock file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as held:  # a file that is linked here keeps its content
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
