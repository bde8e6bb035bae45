"""Shards: documents become token records in a file, with facts about them beside it.

A shard is finished when its facts are there. `finish` joins the shards of a folder to a corpus.
"""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from moe_jax import files, strict_json, untrusted
from moe_jax.data import chat, corpus, encoding, filters
from moe_jax.data.document import Document
from moe_jax.data.encoding import Encoded
from moe_jax.data.tokenizers import Tokenizer

RECORD_TOKENS = 65_536  # a longer document is split into several records
NOT_TOKENIZED = "cannot be tokenized"  # the reason for which such documents are counted
BATCH_BYTES = 1 << 20  # of text, encoded at once
# Zstandard makes files as small as the default, Brotli, does, at 1.4 times its speed.
WRITER = "group_size:1,zstd"
NAME = (
    "tokens-{:05}-{:05}"  # the part of the source, and the shard in it: sorted, they are in order
)
# A hash of a sequence of documents is the sum of their hashes times powers of BASE. Unlike a hash
# of all bytes, it can be joined from those of parts, and does not depend on how shards are cut.
PRIME, BASE = 2**255 - 19, int.from_bytes(hashlib.sha256(b"a sequence of documents").digest())


@dataclasses.dataclass
class Facts:
    """Counts and a hash of token records, and the documents that are not among them."""

    # Label -> its numbers of documents, bytes of text and predicted tokens, in order of appearance.
    labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    byte_counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))
    hash: int = 0
    documents: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad: list[list[str]] = dataclasses.field(default_factory=list)  # [place, reason]

    def add(self, later: "Facts") -> None:
        """Joins the facts of documents that come after these."""
        for label, counts in later.labels.items():
            self.labels[label] = self.labels.get(label, 0) + counts
        self.byte_counts = self.byte_counts + later.byte_counts
        self.hash = (self.hash * pow(BASE, later.documents, PRIME) + later.hash) % PRIME
        self.documents += later.documents
        self.dropped += later.dropped
        self.bad += later.bad

    def add_document(self, document: Document, found: Encoded) -> int:
        """Counts a document with its tokens; returns the number of its label."""
        ids = found.ids_N
        own_bytes = np.frombuffer(found.text.encode(), np.uint8)
        content = len(ids).to_bytes(8, "little") + ids.tobytes() + document.label.encode()
        own = hashlib.sha256(content).digest()
        counts = {document.label: np.array([1, len(own_bytes), found.targets])}
        self.add(Facts(counts, np.bincount(own_bytes, minlength=256), int.from_bytes(own), 1))
        return list(self.labels).index(document.label)

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"hash": f"{self.hash:064x}"}

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> "Facts":
        return cls(
            labels={label: np.array(counts) for label, counts in values["labels"].items()},
            byte_counts=np.array(values["byte_counts"]),
            hash=int(values["hash"], 16),
            documents=values["documents"],
            dropped=collections.Counter(values["dropped"]),
            bad=values["bad"],
        )


def read(path: pathlib.Path) -> Facts | None:
    """The facts of the shard at `path`, a path without an ending; None if it is not finished."""
    if not (beside := path.with_suffix(".json")).exists():
        return None
    values = strict_json.read_object(beside)
    name, num_records, num_bytes, _ = values["shard"]
    records = path.with_name(name)
    if num_records and not (records.exists() and records.stat().st_size == num_bytes):
        return None
    return Facts.of_plain(values["facts"])


def finished(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of facts of the finished shards, in order."""
    return sorted(folder.glob("tokens-*.json"))


def write(
    path: pathlib.Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    chosen: filters.Chosen = filters.NONE,
    *,
    form: chat.Form | None = None,
    dropped: Mapping[str, int] | None = None,
    skip_damaged: int = 0,
) -> Facts:
    """Writes a shard of the documents that the filters of text and tokens keep.

    Args:
      path: a path without an ending; the facts at .json, which are written last, make the others
        valid: .array_record holds the records, .npy their numbers of predicted tokens and labels.
      form: how conversations become tokens; None for text.
      dropped: documents, by reason, that were dropped before.
      skip_damaged: documents that cannot be tokenized are counted; if there are more, it raises.

    Raises: ValueError, with the beginning of the text, or for a path that is not UTF-8.
    """
    untrusted.check_name(path)
    facts, rows = Facts(dropped=collections.Counter(dropped or {})), list[tuple[int, int]]()
    with files.whole_file(path.with_suffix(".array_record")) as unfinished:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), WRITER)
        for document, found in _encoded(documents, tokenizer, chosen, form, facts, skip_damaged):
            label_id, ids = facts.add_document(document, found), found.ids_N
            # Neighbouring records share a token: the last target of one is the next one's first
            # input.
            for start in range(0, len(ids) - 1, RECORD_TOKENS - 1):
                record = ids[start : start + RECORD_TOKENS]
                writer.write(record.tobytes())
                rows.append((len(record) - 1, label_id))
        writer.close()
    records = path.with_suffix(".array_record")
    shard = [records.name, len(rows), records.stat().st_size, corpus.hash_file(records)]
    if not rows:
        records.unlink()
    with files.whole_file(path.with_suffix(".npy")) as unfinished, open(unfinished, "wb") as file:
        np.save(file, np.array(rows, np.int32).reshape(-1, 2))
    files.write_text(
        path.with_suffix(".json"), strict_json.text({"facts": facts.plain(), "shard": shard})
    )
    return facts


def _encoded(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    chosen: filters.Chosen,
    form: chat.Form | None,
    facts: Facts,
    skip_damaged: int,
) -> Iterator[tuple[Document, Encoded]]:
    """The documents that are kept, with their tokens; the facts count the others."""
    for batch in batches(documents, BATCH_BYTES):
        kept = []
        for document in batch:
            if reason := chosen.fault_of_text(document):
                facts.dropped[reason] += 1
            else:
                kept.append(document)
        for document, found in zip(kept, encoding.encode(kept, tokenizer, form), strict=True):
            if isinstance(found, Exception):
                place = f"{document.text[:40]!r} …"
                facts.bad.append([place, f"{NOT_TOKENIZED} ({found!r})"])
                if len(facts.bad) > skip_damaged:
                    raise ValueError(" ".join(facts.bad[-1])) from found
            elif found is None:
                facts.dropped[encoding.TOO_LONG] += 1
            elif reason := chosen.fault_of_tokens(document, found.ids_N[1:-1] & ~corpus.NO_LOSS):
                facts.dropped[reason] += 1
            else:
                if found.left_out:
                    facts.dropped[encoding.CUT] += found.left_out
                yield document, found


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of neighbouring documents; each but the last has at least `size` bytes of text, and
    would have less without its last document."""
    found, num_bytes = list[Document](), 0
    for document in documents:
        found.append(document)
        num_bytes += len(document.text.encode())
        if num_bytes >= size:
            yield found
            found, num_bytes = [], 0
    if found:
        yield found


def finish(
    folder: pathlib.Path, made_of: dict[str, Any], skipped: Mapping[str, int] | None = None
) -> Facts:
    """Joins all shards of a folder, whose names are sorted, and writes the manifest.

    Args:
      made_of: what the corpus was made of, among it "tokenizer", a fingerprint.
      skipped: the records, by reason, that could not be read.

    Returns: the facts; nothing is written if there are no records.
    """
    paths = finished(folder)
    facts, shards = Facts(), []
    for path in paths:
        found = strict_json.read_object(path)
        facts.add(Facts.of_plain(found["facts"]))
        shards += [found["shard"]] if found["shard"][1] else []
    if not shards:
        return facts
    _join_arrays(folder, paths, list(facts.labels))
    counts = np.array(list(facts.labels.values())).T.tolist()
    names = ("documents_per_label", "bytes_per_label", "pairs_per_label")
    digest = hashlib.sha256(f"{facts.documents} {facts.hash:x}".encode()).hexdigest()
    described = {
        "labels": list(facts.labels),
        **dict(zip(names, counts, strict=True)),
        "byte_counts": facts.byte_counts.tolist(),
        "digest": digest,
        "dropped": dict(sorted(facts.dropped.items())),
        "skipped": dict(skipped or {}) | ({NOT_TOKENIZED: len(facts.bad)} if facts.bad else {}),
        "made_of": made_of,
        "weighted": "form" in made_of,
        "shards": shards,
    }
    corpus.seal(folder, described)
    remove_facts(folder)
    return facts


def _join_arrays(folder: pathlib.Path, paths: Sequence[pathlib.Path], labels: list[str]) -> None:
    arrays = [np.load(path.with_suffix(".npy"), mmap_mode="r") for path in paths]
    shape = (sum(map(len, arrays)),)
    columns = [
        np.lib.format.open_memmap(folder / name, "w+", np.int32, shape) for name in corpus.ARRAYS
    ]
    at, numbers = 0, {label: i for i, label in enumerate(labels)}
    for path, rows in zip(paths, arrays, strict=True):
        own = strict_json.read_object(path)["facts"]["labels"]
        there = slice(at, at + len(rows))
        columns[0][there] = rows[:, 0]
        columns[1][there] = np.array([numbers[label] for label in own] or [0])[rows[:, 1]]
        at = there.stop
    for column in columns:
        column.flush()


def remove_facts(folder: pathlib.Path) -> None:
    """Removes what the manifest has made superfluous."""
    for pattern in ("tokens-*.json", "tokens-*.npy"):
        for path in folder.glob(pattern):
            path.unlink()
