"""Atomic writes: a file or folder is written under a temporary name next to it, then renamed."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path that becomes `path` at the end, and is deleted if anything is raised."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.unfinished-"
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.replace(folder)
        except OSError:
            if not (shared and folder.exists()):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
