"""The user's own files as a source: text, JSON lines and tables, each read by its name's end."""

import collections
import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from moe_jax import untrusted
from moe_jax.data import cache, compressed, document, policy, record_files, stored, utf8
from moe_jax.data.document import TEST, TRAIN, VALIDATION, Document, is_held_out
from moe_jax.data.policy import STRICT, Reading, Skipped, UnusableError
from moe_jax.files import is_remote

PART_CHARACTERS = 10_000
GROUP_BYTES = 256 << 20
DIVIDED = "divided into train and validation"
# The words in a file's name that decide its split: those of Hugging Face's datasets
# (huggingface.co/docs/datasets/repository_structure), and a few more. The first match decides.
WORDS = {
    TEST: "(dev)?test(ing)?|eval(uation)?",
    VALIDATION: "val(id(ation)?)?|dev|h[eo]ld[-_. ]?out",
    TRAIN: "train(ing)?",
}
SHARD = re.compile(r"-\d+-of-\d+$")
_LETTER = r"[^\W\d_]"
NAMES = {
    split: re.compile(f"(?<!{_LETTER})({words})([-_. ]?set)?(?!{_LETTER})", re.IGNORECASE)
    for split, words in WORDS.items()
}


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source."""

    path: stored.Path
    name: str  # the path relative to the source, so that it does not depend on the source's place
    split: str  # TRAIN, VALIDATION, TEST, or DIVIDED if each document has its own split


def describe(spec: str, files: list[File]) -> str:
    """The number of files and bytes, and the names by which files belong to a split."""
    num_bytes = sum(stored.size(file.path) for file in files)
    counts = collections.Counter(file.split for file in files)
    shares = [f"{split}: {_number(n)}" for split, n in sorted(counts.items()) if split != TEST]
    if left_out := [file.name for file in files if file.split == TEST]:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        shares.append(f"not trained on, for the name says test: {', '.join(left_out[:3])}{more}")
    return f"data.source={spec!r}: {_number(len(files))}, {num_bytes:,} bytes ({'; '.join(shares)})"


def _number(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def fingerprint(files: list[File], memory: pathlib.Path) -> str:
    """A hash of the files' names and contents; `memory` keeps the hashes of large files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + stored.digest(file.path, memory).encode())
    return digest.hexdigest()


def documents(
    files: list[File],
    split: str,
    *,
    validation_fraction: float,
    reading: Reading = STRICT,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """The documents of a split, chosen by file name or otherwise by a hash of the document's key.

    The key of a record is its `doc`, or else its `id`, or else its text. The key of a part of
    a .txt file is the file's path relative to the source, with the number of the part. A record of
    more than `reading.max_line` characters is refused: a small compressed file may hold an endless
    line. A record that cannot be used is added to `skipped`.
    """
    skipped = skipped or Skipped(reading.skip_damaged)
    wanted = (split,) if split == TEST else (split, DIVIDED)
    files = [file for file in files if file.split in wanted]
    plain = [file.path for file in files if _ending(file.path.name) == ".txt"]
    if reading.conversations and plain:
        raise ValueError(
            f"data.source: {plain[0]} is text, which has no conversations; give .jsonl or "
            ".parquet, or set config.data.conversations=False"
        )
    before = {file: stored.state(file.path) for file in files}
    for file in files:
        try:
            for found in _records(file, reading):
                if isinstance(found, UnusableError):
                    if not reading.skip_damaged:
                        _check_whole(file)  # it may be what damage to the file looks like
                    skipped.add(found)
                    continue
                key, text = found
                held_out = is_held_out(key, validation_fraction)
                if file.split == split or held_out == (split == VALIDATION):
                    yield text
        except UnusableError as error:  # the rest of the file is lost
            skipped.add(error)
        if stored.state(file.path) != before[file]:
            raise ValueError(
                f"data.source: {file.path} changed while it was read; wait until it is complete"
            )


def _records(file: File, reading: Reading) -> "Records":
    """The records of a file. If damage is skipped, a compressed file that is damaged yields none,
    because those before the damage was noticed may be damaged too."""
    if reading.skip_damaged:
        _check_whole(file)
    return READERS[_ending(file.path.name)](file, reading)


def _check_whole(file: File) -> None:
    """Raises UnusableError for a compressed file that cannot be read to its end, where its checksum
    is. An endless line costs no memory."""
    if file.path.suffix in compressed.OPENERS:
        with utf8.opened(file.path) as text:
            while text.read(compressed.BUFFER_BYTES):
                pass


def parts(files: list[File]) -> list[list[File]]:
    """The files in groups of neighbours; each but the last has at least `GROUP_BYTES`."""
    ends, size = [0], 0
    for number, file in enumerate(files, start=1):
        size += stored.size(file.path)
        if size >= GROUP_BYTES or number == len(files):
            ends.append(number)
            size = 0
    return [files[first:end] for first, end in itertools.pairwise(ends)]


def find(spec: str) -> list[File]:
    """The files of a path, folder or glob, in the order in which they are read.

    Raises: ValueError if there are none, or for one that cannot be read.
    """
    if is_remote(spec):
        return _in_store(spec)
    root = pathlib.Path(spec)
    if root.is_dir():
        return _in_folder(spec, root)
    if root.exists():
        return [_usable(root, root.parent, DIVIDED)]
    found = [pathlib.Path(p) for p in glob.glob(spec, recursive=True) if not os.path.isdir(p)]
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), root.parts)
    if not found:
        raise ValueError(
            f"data.source={spec!r} matches no file; give a file, folder, glob or 'embedded'"
        )
    return _with_splits(spec, pathlib.Path(*plain), record_files.of_saved_datasets(found))


def _in_folder(spec: str, root: pathlib.Path) -> list[File]:
    """`find` in a folder."""
    entries = [path for path in root.rglob("*") if not _is_hidden(path.relative_to(root))]
    folders = {path for path in entries if path.is_dir()}
    if shut := sorted(path for path in folders if not os.access(path, os.R_OK | os.X_OK)):
        raise ValueError(f"data.source: {shut[0]} cannot be read; check its permissions")
    for linked in sorted(path for path in folders if path.is_symlink()):
        if any(_ending(path.name) for path in linked.rglob("*")):
            raise ValueError(
                f"data.source: {linked} is a link to a folder of text, which is not followed: name "
                "the files by a glob"
            )
    # Folders with tokens of this very text.
    caches = {path.parent for path in entries if path.name == cache.TAG}
    found = [path for path in entries if _ending(path.name) and path not in folders]
    found = [path for path in found if caches.isdisjoint(path.parents)]
    if not found:
        raise ValueError(f"data.source={spec!r} is a folder without {' or '.join(READERS)}")
    files = _with_splits(spec, root, record_files.of_saved_datasets(found))
    if out := next((f.path for f in files if untrusted.leads_out(f.path, root)), None):
        raise ValueError(
            f"data.source: {out} is a link out of its folder, which is not followed: put the "
            "file itself there, or name the files by a glob"
        )
    return files


def _in_store(spec: str) -> list[File]:
    """`find` in an object store."""
    root, found = stored.found_in(spec)
    if found == [stored.path_of(spec)]:
        return [_usable(found[0], root, DIVIDED)]
    if stored.path_of(spec) == root:
        found = [p for p in found if _ending(p.name) and not _is_hidden(p.relative_to(root))]
    if not found:
        raise ValueError(f"data.source={spec!r} matches no {' or '.join(READERS)}")
    return _with_splits(spec, root, found)


def _with_splits(spec: str, root: stored.Path, found: list[stored.Path]) -> list[File]:
    splits = divided(spec, {path: split_in(path.relative_to(root)) for path in sorted(found)})
    return [_usable(path, root, split) for path, split in splits.items()]


def divided(spec: str, named: Mapping[pathlib.Path, str]) -> dict[pathlib.Path, str]:
    """The split of each file, from those that their names say.

    Files whose names do not name a split are trained on. Only if no file is validation text are
    documents divided between training and validation.
    """
    rest = TRAIN if VALIDATION in named.values() else DIVIDED
    splits = {path: rest if split in (TRAIN, "") else split for path, split in named.items()}
    if rest not in splits.values():
        raise ValueError(
            f"data.source={spec!r}: nothing is left to train on, for the names of all files say "
            f"validation or test, such as {next(iter(named)).name}; rename them, or give one "
            "file's path"
        )
    return splits


def _ending(name: str) -> str:
    """The end of a file's name by which it is read; "" if none reads it."""
    name = SHARD.sub("", name)
    return next((ending for ending in READERS if name.endswith(ending)), "")


def _is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def split_in(path: pathlib.Path) -> str:
    """The split named by a file's name, or else by its nearest folder's; "" if none names one."""
    for part in reversed(path.parts):
        for split, name in NAMES.items():
            if name.search(part):
                return split
    return ""


def _usable(path: pathlib.Path, root: pathlib.Path, split: str) -> File:
    if not _ending(path.name):
        raise ValueError(f"data.source: {path} is not one of {', '.join(READERS)}")
    if is_remote(path):
        if _ending(path.name) == ".array_record":
            raise ValueError(f"data.source: {path} is ArrayRecord; copy it to a local folder")
    elif not path.is_file():
        kind = "a link to nothing" if path.is_symlink() and not path.exists() else "no regular file"
        raise ValueError(f"data.source: {path} is {kind}; remove it, or put the file itself there")
    elif not os.access(path, os.R_OK):
        raise ValueError(f"data.source: {path} cannot be read; check its permissions")
    untrusted.check_name(path, "data.source: ")
    return File(path, path.relative_to(root).as_posix(), split)


def _txt_documents(file: File, reading: Reading) -> "Records":
    """The parts of about 10,000 characters, split at line ends if it can; a long line is cut."""
    label, first_line = _label(file, reading), 1
    with utf8.opened(file.path) as text:
        for number, part in enumerate(_parts(text)):
            try:
                utf8.check(file.path, part, first_line)
                yield f"{file.name}#{number}", Document(part, label)
            except UnusableError as error:
                yield error
            first_line += part.count("\n")


def _parts(text: TextIO) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in _lines(text):
        if lines and size + len(line) > PART_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if size:
        yield "".join(lines)


def _lines(text: TextIO) -> Iterator[str]:
    """The lines of a text; a line longer than a part comes in pieces, split after spaces if it can.

    A byte order mark is removed at the beginning of a line, because files with marks may have been
    concatenated, but not at the beginning of a later piece.
    """
    rest, begins = "", True
    while line := text.readline(PART_CHARACTERS - len(rest)):
        is_long = len(rest) + len(line) == PART_CHARACTERS and not line.endswith("\n")
        line = (rest + line).lstrip(utf8.BYTE_ORDER_MARK if begins else "")
        end = line.rfind(" ") + 1 if is_long else 0
        yield line[: end or len(line)]
        rest, begins = line[end or len(line) :], not is_long
    yield rest


def _jsonl_documents(file: File, reading: Reading) -> "Records":
    """The lines that are not empty."""
    label, most = _label(file, reading), reading.max_line
    with utf8.opened(file.path) as text:
        for number, line in enumerate(iter(lambda: text.readline(most + 1), ""), start=1):
            try:
                policy.check_length(line.rstrip("\n"), most)
                utf8.check(file.path, line, number)
                content = line.strip().lstrip(utf8.BYTE_ORDER_MARK)
                if content:
                    yield document.from_json(content, reading, label)
            except Exception as error:  # includes RecursionError for a record nested too deeply
                yield policy.refusal(f"{file.path}:{number}", error)
            if len(line) > most:
                while line and not line.endswith("\n"):  # the rest of a line that is too long
                    line = text.readline(utf8.BUFFER_BYTES)


def _label(file: File, reading: Reading) -> str:
    """The label of the records of a file that have none of their own."""
    found = re.search(reading.label_pattern, file.name) if reading.label_pattern else None
    return found[1] if found else "all"


def _parquet(file: File, reading: Reading) -> "Records":
    from moe_jax.data import arrow_files

    return arrow_files.parquet(file.path, reading, _label(file, reading))


def _arrow(file: File, reading: Reading) -> "Records":
    from moe_jax.data import arrow_files

    return arrow_files.arrow(file.path, reading, _label(file, reading))


def _array_record(file: File, reading: Reading) -> "Records":
    return record_files.array_record(file.path, reading, _label(file, reading))


# The key and the document of each record, or the error for one that cannot be used. A reader raises
# the error that ends the file.
Records = Iterator[tuple[str, Document] | UnusableError]
# How a file is read, by the end of its name, before which shards may have their numbers.
READERS: dict[str, Callable[[File, Reading], Records]] = {
    ".txt": _txt_documents,
    ".jsonl": _jsonl_documents,
    # A .json file may be anything, but corpora publish lines as .json.gz and .json.zst.
    **{f".{n}{end}": _jsonl_documents for n in ("jsonl", "json") for end in compressed.OPENERS},
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".array_record": _array_record,
}
