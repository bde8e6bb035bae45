"""A person's own files as a source: .txt and .jsonl, the latter also compressed."""

import glob
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator

from moe_jax.data.document import VALIDATION, Document, is_held_out

OPENERS: dict[str, Callable] = {".txt": open, ".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz")
PART_CHARACTERS = 10_000


def check(spec: str) -> None:
    _files(spec)


def fingerprint(spec: str, data_dir: pathlib.Path) -> str:
    del data_dir  # the files lie where the spec says
    digest = hashlib.sha256()
    for path in _files(spec):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def documents(
    spec: str, split: str, *, validation_fraction: float, data_dir: pathlib.Path
) -> Iterator[Document]:
    """The documents of a split, chosen by the hash of each document's key.

    The key of a JSON record is its `doc`, else `id`, else its text; that of a .txt file its name
    and part.
    """
    del data_dir
    for path in _files(spec):
        for key, document in _file_documents(path):
            if is_held_out(key, validation_fraction) == (split == VALIDATION):
                yield document


def _files(spec: str) -> list[pathlib.Path]:
    root = pathlib.Path(spec)
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
        if not found:
            raise ValueError(f"data.source={spec!r} is a folder without {' or '.join(SUFFIXES)}")
    else:
        found = [pathlib.Path(p) for p in glob.glob(spec)] or ([root] if root.exists() else [])
        if not found:
            raise ValueError(
                f"data.source={spec!r} matches no file; give a file, folder, glob or 'embedded'"
            )
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"data.source: {path} is not one of {', '.join(SUFFIXES)}")
        if not os.access(path, os.R_OK):
            raise ValueError(f"data.source: {path} cannot be read; check its permissions")
    return sorted(found)


def _file_documents(path: pathlib.Path) -> Iterator[tuple[str, Document]]:
    """(key, document) of a file, the key deciding the split."""
    read = _jsonl_documents if ".jsonl" in path.name else _txt_documents
    try:
        with OPENERS[path.suffix](path, "rt", encoding="utf-8") as file:
            yield from read(path, file)
    except UnicodeDecodeError as error:
        reason = error.reason
        raise ValueError(f"data.source: {path} is not UTF-8 ({reason}); convert it") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data.source: {path} cannot be read ({error}); replace it") from error


def _txt_documents(path: pathlib.Path, file) -> Iterator[tuple[str, Document]]:
    """Cuts a text at line ends into parts of some 10,000 characters, some of them held out."""
    lines: list[str] = []
    size = part = 0
    for line in file:
        if lines and size + len(line) > PART_CHARACTERS:
            yield f"{path.name}#{part}", Document("".join(lines), "all")
            lines, size, part = [], 0, part + 1
        lines.append(line)
        size += len(line)
    if size:
        yield f"{path.name}#{part}", Document("".join(lines), "all")


def _jsonl_documents(path: pathlib.Path, file) -> Iterator[tuple[str, Document]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"data.source: {path}:{number}"
        try:
            record = json.loads(line)
            text = record["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{where} is not a JSON object with "text"; mend the line') from None
        if not isinstance(text, str):
            raise ValueError(f'{where}: "text" is not a string; mend the line')
        label = str(record.get("language") or record.get("lang") or "all")
        key = str(next((record[k] for k in ("doc", "id") if record.get(k) not in (None, "")), text))
        try:
            f"{key}{label}{text}".encode()
        except UnicodeEncodeError:  # JSON can escape what no text can hold
            raise ValueError(f"{where} has half a surrogate pair; mend the line") from None
        yield key, Document(text, label)
