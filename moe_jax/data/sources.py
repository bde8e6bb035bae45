"""Where text comes from: the embedded corpus, a TFDS dataset, or a person's own files."""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator

TRAIN, VALIDATION = "train", "validation"
OPENERS = {".txt": open, ".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz")
PART_CHARACTERS = 10_000


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the label (a language, or "all") its losses are reported under."""

    text: str
    label: str


def check(source: str) -> None:
    """Refuses a source that cannot be read, without reading it.

    Raises: ValueError, in one line.
    """
    if source != "embedded" and not source.startswith("tfds:"):
        _files(source)
    elif source == "tfds:":
        raise ValueError("data.source='tfds:' names no dataset; use tfds:NAME")


def fingerprint(source: str, data_dir: pathlib.Path) -> str:
    """A hash of what the source holds: equal text has equal fingerprints, wherever it lies."""
    if _is_tfds(source):
        info = _builder(source, data_dir).info
        return f"{info.full_name}:{sorted((s.name, s.num_examples) for s in info.splits.values())}"
    digest = hashlib.sha256()
    for path in _files(source):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def documents(
    source: str, split: str, *, validation_fraction: float, data_dir: pathlib.Path
) -> Iterator[Document]:
    """The documents of a split.

    Args:
      source: "embedded", "tfds:NAME" with NAME a builder of `data/corpora` or a dataset prepared as
        ArrayRecord under `data_dir`, or a file, folder or glob of .txt and .jsonl[.gz|.xz].
      split: "train" or "validation"; a TFDS dataset must have splits of these names.
      validation_fraction: of the documents of files, chosen by the hash of their key: of a JSON
        record its `doc`, else `id`, else text; of a .txt file its name and part.

    Raises: ValueError naming the place of a record that cannot be used.
    """
    if _is_tfds(source):
        yield from _tfds_documents(source, split, data_dir)
        return
    for path in _files(source):
        for key, document in _file_documents(path):
            if is_held_out(key, validation_fraction) == (split == VALIDATION):
                yield document


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document `key` is in the held-out split: a fixed pseudo-random choice."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def _is_tfds(source: str) -> bool:
    return source == "embedded" or source.startswith("tfds:")


def _builder(source: str, data_dir: pathlib.Path):
    # TFDS takes most of a second to import, and a person's own files need none of it.
    import tensorflow_datasets as tfds

    from moe_jax.data import corpora

    name = "lo_parallel19" if source == "embedded" else source.removeprefix("tfds:")
    data_dir.mkdir(parents=True, exist_ok=True)
    if name in corpora.BUILDERS:
        builder = corpora.BUILDERS[name](data_dir=data_dir, file_format="array_record")
        # TFDS prepares in a temporary folder and renames it: another process may do so too.
        tfds.disable_progress_bar()  # it takes two seconds
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        return builder
    try:
        return tfds.builder(name, data_dir=data_dir)
    # The last two for a name that cannot be one, and a version that does not exist.
    except (
        tfds.core.DatasetNotFoundError,
        ModuleNotFoundError,
        ValueError,
        AssertionError,
    ) as error:
        raise ValueError(
            f"data.source={source!r} is not a dataset prepared under {data_dir}; embedded ones are "
            f"{', '.join(corpora.BUILDERS)}"
        ) from error


def _tfds_documents(source: str, split: str, data_dir: pathlib.Path) -> Iterator[Document]:
    builder = _builder(source, data_dir)
    if split not in builder.info.splits:
        raise ValueError(
            f"data.source={source!r} has no split {split!r}, only {list(builder.info.splits)}"
        )
    for record in builder.as_data_source(split):
        label = record.get("language", b"all")
        yield Document(record["text"].decode(), label.decode())


def _files(source: str) -> list[pathlib.Path]:
    root = pathlib.Path(source)
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
        if not found:
            raise ValueError(f"data.source={source!r} is a folder without {' or '.join(SUFFIXES)}")
    else:
        found = [pathlib.Path(p) for p in glob.glob(source)] or ([root] if root.exists() else [])
        if not found:
            raise ValueError(
                f"data.source={source!r} matches no file; give a file, folder, glob or 'embedded'"
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
        raise ValueError(
            f"data.source: {path} is not UTF-8 ({error.reason}); convert it"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data.source: {path} cannot be read ({error}); replace it") from error


def _txt_documents(path: pathlib.Path, file) -> Iterator[tuple[str, Document]]:
    """Parts of some 10,000 characters, cut at line ends: one big file has held-out parts too."""
    lines, size, part = [], 0, 0
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
        try:
            record = json.loads(line)
            text = record["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'data.source: {path}:{number} is not a JSON object with "text"; mend the line'
            ) from None
        if not isinstance(text, str):
            raise ValueError(f'data.source: {path}:{number}: "text" is not a string; mend the line')
        label = str(record.get("language") or record.get("lang") or "all")
        key = str(next((record[k] for k in ("doc", "id") if record.get(k) not in (None, "")), text))
        try:
            f"{key}{label}{text}".encode()
        except UnicodeEncodeError:  # JSON can escape what no text can hold
            raise ValueError(
                f"data.source: {path}:{number} has half a surrogate pair; mend the line"
            ) from None
        yield key, Document(text, label)
