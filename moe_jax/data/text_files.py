"""The user's own files as a source: text, JSON lines and tables, each read by its name's end."""

import codecs
import collections
import contextlib
import dataclasses
import glob
import hashlib
import io
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from moe_jax import untrusted
from moe_jax.data import cache, compressed, document, record_files
from moe_jax.data.document import TRAIN, VALIDATION, Document, is_held_out

PART_CHARACTERS = 10_000
GROUP_BYTES = 256 << 20
MAX_LINE = 30_000_000  # the default of config.data.max_line
BYTE_ORDER_MARK = "\ufeff"
# Byte order marks of encodings other than UTF-8. UTF-32 comes first: its mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Control characters, which are rare in UTF-8 text but are the high bytes of letters in UTF-16 and
# UTF-32: 0 for Latin, 3 for Greek, 4 for Cyrillic. Tabs and line ends are excluded.
CONTROL = bytes(set(range(32)) - set(b"\t\n\r"))
# Text without a byte order mark is recognised by which of every four bytes are mostly control
# characters ("0") and which mostly are not ("."). The keys are regular expressions.
REGULAR = {r"00.\.": "UTF-32BE", r"\..00": "UTF-32LE", r"0\.0\.": "UTF-16BE", r"\.0\.0": "UTF-16LE"}
SAMPLE_BYTES, MIN_SAMPLE_BYTES, BUFFER_BYTES = 4096, 16, 65_536

TEST, DIVIDED = "test", "divided into train and validation"
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

    path: pathlib.Path
    name: str  # the path relative to the source, so that it does not depend on the source's place
    split: str  # TRAIN, VALIDATION, TEST, or DIVIDED if each document has its own split


def describe(spec: str, files: list[File]) -> str:
    """The number of files and bytes, and the names by which files belong to a split."""
    num_bytes = sum(file.path.stat().st_size for file in files)
    counts = collections.Counter(file.split for file in files)
    shares = [f"{split}: {_number(n)}" for split, n in sorted(counts.items()) if split != TEST]
    if left_out := [file.name for file in files if file.split == TEST]:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        shares.append(f"not read, for the name says test: {', '.join(left_out[:3])}{more}")
    return f"data.source={spec!r}: {_number(len(files))}, {num_bytes:,} bytes ({'; '.join(shares)})"


def _number(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def fingerprint(files: list[File]) -> str:
    """A hash of the files' names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with open(file.path, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def documents(
    files: list[File], split: str, *, validation_fraction: float, max_line: int = MAX_LINE
) -> Iterator[Document]:
    """The documents of a split, chosen by file name or otherwise by a hash of the document's key.

    The key of a record is its `doc`, or else its `id`, or else its text. The key of a part of
    a .txt file is the file's path relative to the source, with the number of the part. A record of
    more than `max_line` characters is refused: a small compressed file may hold an endless line.
    """
    for file in files:
        if file.split not in (split, DIVIDED):
            continue
        try:
            for key, found in READERS[_ending(file.path.name)](file, max_line):
                held_out = is_held_out(key, validation_fraction)
                if file.split == split or held_out == (split == VALIDATION):
                    yield found
        except ValueError as error:
            raise ValueError(f"data.source: {error}") from error


def parts(files: list[File]) -> list[slice]:
    """The files in groups of neighbours; each but the last has at least `GROUP_BYTES`."""
    ends, size = [0], 0
    for number, file in enumerate(files, start=1):
        size += file.path.stat().st_size
        if size >= GROUP_BYTES or number == len(files):
            ends.append(number)
            size = 0
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def find(spec: str) -> list[File]:
    """The files of a path, folder or glob, in the order in which they are read.

    Raises: ValueError if there are none, or for one that cannot be read.
    """
    root = pathlib.Path(spec)
    if root.is_dir():
        entries = list(root.rglob("*"))
        found = [p for p in entries if _ending(p.name) and p.is_file()]
        found = [p for p in found if not _is_hidden(p.relative_to(root))]
        caches = {
            path.parent for path in entries if path.name == cache.TAG
        }  # with tokens of this very text
        found = [p for p in found if caches.isdisjoint(p.parents)]
        if not found:
            raise ValueError(f"data.source={spec!r} is a folder without {' or '.join(READERS)}")
        if out := next((path for path in found if untrusted.leads_out(path, root)), None):
            raise ValueError(
                f"data.source: {out} is a link out of its folder, which is not followed: put the "
                "file itself there, or name the files by a glob"
            )
    elif root.exists():
        return [_usable(root, root.parent, DIVIDED)]
    else:
        found = [pathlib.Path(p) for p in glob.glob(spec, recursive=True) if not os.path.isdir(p)]
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), root.parts)
        root = pathlib.Path(*plain)
        if not found:
            raise ValueError(
                f"data.source={spec!r} matches no file; give a file, folder, glob or 'embedded'"
            )
    found = record_files.of_saved_datasets(found)
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
    if not _ending(path.name) or not path.is_file():
        raise ValueError(f"data.source: {path} is not one of {', '.join(READERS)}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"data.source: {path} cannot be read; check its permissions")
    return File(path, path.relative_to(root).as_posix(), split)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[TextIO]:
    """The text of a file, which may be compressed.

    Raises: ValueError, with the file and, if known, the line, for a file that is not UTF-8 text or
      cannot be read.
    """
    try:
        with compressed.open_file(path) as content:
            kind = _encoding(content.read(SAMPLE_BYTES))
        if kind != "UTF-8":
            fix = f"convert it, for example with iconv -f {kind} -t UTF-8"
            raise ValueError(f"{path} is {kind}, not UTF-8; {fix}")
        with compressed.open_file(path) as content:
            yield io.TextIOWrapper(content, encoding="utf-8")
    except UnicodeDecodeError as error:
        where = f"line {_good_lines(path) + 1}"
        raise ValueError(f"{path} is not UTF-8 ({error.reason}, {where}); convert it") from error
    except compressed.ERRORS as error:
        where = f" after line {number}" if (number := _good_lines(path)) else ""
        raise ValueError(f"{path} cannot be read{where} ({error}); replace it") from error


def _encoding(sample: bytes) -> str:
    """The encoding of a file that begins with `sample`, as iconv spells it.

    It is UTF-8 unless a byte order mark or a regular pattern of control characters proves another
    one; a NUL alone does not, because UTF-8 may contain it.
    """
    for mark, kind in MARKS.items():
        if sample.startswith(mark):
            return kind
    if len(sample) < MIN_SAMPLE_BYTES:
        return "UTF-8"
    columns = [sample[i::4] for i in range(4)]
    shares = [1 - len(column.translate(None, CONTROL)) / len(column) for column in columns]
    found = "".join("0" if share > 0.5 else "." if share < 0.25 else "?" for share in shares)
    return next((kind for form, kind in REGULAR.items() if re.fullmatch(form, found)), "UTF-8")


def _good_lines(path: pathlib.Path) -> int:
    """The number of lines before the one that cannot be read."""
    number, decoder = 0, codecs.getincrementaldecoder("utf-8")()
    with contextlib.suppress(Exception), compressed.open_file(path) as content:
        while chunk := content.read1(BUFFER_BYTES):  # all that can be read of a damaged archive
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                # `error` counts from the bytes that the decoder kept of the chunk before.
                begins = len(error.object) - len(chunk)
                return number + chunk[: max(0, error.start - begins)].count(b"\n")
            number += chunk.count(b"\n")
    return number


def _txt_documents(file: File, max_line: int) -> Iterator[tuple[str, Document]]:
    """Yields (key, document) for parts of about 10,000 characters, split at line ends if it can."""
    del max_line  # a long line is cut
    lines: list[str] = []
    size = part = 0
    with _opened(file.path) as text:
        for line in _lines(text):
            if lines and size + len(line) > PART_CHARACTERS:
                yield f"{file.name}#{part}", Document("".join(lines), "all")
                lines, size, part = [], 0, part + 1
            lines.append(line)
            size += len(line)
    if size:
        yield f"{file.name}#{part}", Document("".join(lines), "all")


def _lines(text: TextIO) -> Iterator[str]:
    """The lines of a text; a line longer than a part comes in pieces, split after spaces if it can.

    A byte order mark is removed at the beginning of a line, because files with marks may have been
    concatenated, but not at the beginning of a later piece.
    """
    rest, begins = "", True
    while line := text.readline(PART_CHARACTERS - len(rest)):
        is_long = len(rest) + len(line) == PART_CHARACTERS and not line.endswith("\n")
        line = (rest + line).lstrip(BYTE_ORDER_MARK if begins else "")
        end = line.rfind(" ") + 1 if is_long else 0
        yield line[: end or len(line)]
        rest, begins = line[end or len(line) :], not is_long
    yield rest


def _jsonl_documents(file: File, max_line: int) -> Iterator[tuple[str, Document]]:
    """Yields (key, document) for each line that is not empty."""
    with _opened(file.path) as text:
        for number, line in enumerate(iter(lambda: text.readline(max_line + 1), ""), start=1):
            place = f"{file.path}:{number}"
            document.check_length(place, line.rstrip("\n"), max_line)
            try:
                line = line.strip().lstrip(BYTE_ORDER_MARK)
                found = document.from_json(line) if line else None
            except Exception as error:  # includes RecursionError for a record nested too deeply
                raise document.refusal(place, error) from None
            if found:
                yield found


def _parquet(file: File, max_line: int) -> Iterator[tuple[str, Document]]:
    from moe_jax.data import arrow_files

    return arrow_files.parquet(file.path, max_line)


def _arrow(file: File, max_line: int) -> Iterator[tuple[str, Document]]:
    from moe_jax.data import arrow_files

    return arrow_files.arrow(file.path, max_line)


def _array_record(file: File, max_line: int) -> Iterator[tuple[str, Document]]:
    return record_files.array_record(file.path, max_line)


# How a file is read, by the end of its name, before which shards may have their numbers.
READERS: dict[str, Callable[[File, int], Iterator[tuple[str, Document]]]] = {
    ".txt": _txt_documents,
    ".jsonl": _jsonl_documents,
    # A .json file may be anything, but corpora publish lines as .json.gz and .json.zst.
    **{f".{n}{end}": _jsonl_documents for n in ("jsonl", "json") for end in compressed.OPENERS},
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".array_record": _array_record,
}
