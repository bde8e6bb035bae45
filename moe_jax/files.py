"""Atomic writes: a file or folder is written under a temporary name next to it, then renamed.

A path in a bucket is an `etils.epath.Path`, which has the methods of a pathlib.Path used here.
"""

import contextlib
import errno
import fcntl
import glob
import itertools
import os
import pathlib
import re
import shutil
import socket
import uuid
from collections.abc import Iterator

from moe_jax import stopping

NUMBER = "0|[1-9][0-9]*"  # as str(int) writes it
FIXES = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some of your quota there, or choose another place",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "give yourself the permission, or choose another path",
    errno.EPERM: "give yourself the permission, or choose another path",
    errno.EISDIR: "give a file, or move the folder away if a file is to be written there",
    errno.ENOTDIR: "a folder belongs where a file is: move the file away, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def fix(error: Exception) -> str:
    """What a person can do about an error of the file system, as the end of its line."""
    advice = FIXES.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"; {advice}" if advice else ""


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path that becomes `path` at the end, and is deleted if anything is raised.

    Raises: OSError, with a path also where the system's has none, as for a full disk.
    """
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # it may be a link, which would be written through
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def is_remote(path: str | os.PathLike) -> bool:
    """True for a path in a bucket."""
    return "://" in os.fspath(path)


def is_there(path: pathlib.Path) -> bool:
    """True for a file, a folder or a link, even one that leads nowhere."""
    return path.exists() or os.path.islink(path)


def nearest(path: pathlib.Path) -> pathlib.Path:
    """The path itself if it is there, otherwise the nearest folder or file above it."""
    return next(p for p in (path, *path.absolute().parents) if is_there(p))


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
    # On some network file systems a lock is one host's alone, so each removes its own leftovers.
    mine = f".{folder.name}.unfinished-{socket.gethostname()}-"
    for leftover in folder.parent.glob(f"{glob.escape(mine)}*"):
        _remove_if_abandoned(leftover)
    new = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:12]}")
    new.mkdir(parents=True)  # with the umask's permissions, unlike mkdtemp
    lock = os.open(new, os.O_RDONLY)
    # It gets its name when it is locked, so that no other process takes it for a leftover.
    unfinished = folder.with_name(f"{mine}{uuid.uuid4().hex[:12]}")
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        new.rename(unfinished)
        yield unfinished
        try:
            unfinished.replace(folder)
        except OSError:
            if not (shared and folder.exists()):
                raise
    finally:
        stopping.quiet()  # or its repetitions would interrupt the removal
        for path in (new, unfinished):
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(unfinished: pathlib.Path) -> None:
    """Removes the temporary folder of a process that was killed, which has lost its lock."""
    with contextlib.suppress(OSError):  # it is locked or gone, or locks are not to be had here
        lock = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(unfinished, ignore_errors=True)
        finally:
            os.close(lock)


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
