"""Reading a folder that somebody else may have made: nothing in it leads out of it."""

import os
import pathlib
import re
import stat
from collections.abc import Iterator

# The folders of a workdir in which every file belongs to the run. `checkpoints` is not among them:
# a link in it is no checkpoint, and each checkpoint is examined before it is read.
OWN_FOLDERS = ("tokenizer", "tensorboard", "figures", "parents")
LOCK = ".lock"
LONGEST_LABEL = 100


def check_folder(workdir: pathlib.Path) -> None:
    """Refuses a workdir in which a link, or a pipe or device, stands in for a file of the run.

    Hidden entries other than the lock are not examined, because a run neither reads nor writes
    them. The workdir itself may be a link, and a link may lead to another place in the workdir.

    Raises: ValueError, with the path.
    """
    root = workdir.resolve()
    for path in _entries(workdir):
        try:
            mode = path.stat().st_mode
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # before Python 3.13, a loop of links is a RuntimeError
            raise ValueError(f"{path} is a link to nothing; remove it") from None
        if not inside:
            raise ValueError(
                f"{path} is a link out of its folder, which is not followed: put the file or "
                "folder itself there, or remove the link"
            )
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} is neither a file nor a folder; remove it")


def check_name(path: os.PathLike, before: str = "") -> None:
    """Refuses a path that is not UTF-8: libraries in C++ cannot open it, nor can JSON hold it.

    Raises: ValueError, with `before` in front.
    """
    if (name := str(path)) != name.encode(errors="replace").decode():
        raise ValueError(f"{before}the name {ascii(name)} is not UTF-8; rename the file or folder")


def leads_out(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """True if a link leads from a file below `folder` to a place that is not below it.

    From a snapshot in the Hugging Face cache (datasets--X--Y/snapshots/<revision>), links may lead
    to the blobs of the same dataset.
    """
    root, target = folder.resolve(), path.resolve()
    caches = (parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")
    return not target.is_relative_to(root) and target.parent not in caches


def _entries(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    if not workdir.is_dir():
        return
    for path in sorted(workdir.iterdir()):
        if path.name == LOCK or not path.name.startswith("."):
            yield path
    for name in OWN_FOLDERS:
        for folder, folders, files in os.walk(workdir / name):  # which does not follow links
            yield from (pathlib.Path(folder, inner) for inner in (*folders, *files))


def line(text: str) -> str:
    """A text with folders, names or values of a stranger, for one line of a terminal: characters
    that do not print, such as line ends and escape sequences, are shown as Python's escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def page(text: str) -> str:
    """A text for a terminal, which keeps its lines and tabs: other control characters are shown as
    Python's escapes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: line(found[0]), text)


def label(text: str) -> str:
    """A text of a workdir, for a figure, a page or a terminal: short, and without characters that
    do not print, such as line ends, escape sequences and marks of the writing direction."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return plain if len(plain) <= LONGEST_LABEL else plain[: LONGEST_LABEL - 1] + "…"
