"""Random access to the token records that `prepare.open_corpus` wrote."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import grain
import numpy as np

from moe_jax import stopping, strict_json

ARRAYS = ("pairs.npy", "label_ids.npy")
RECORDS = "tokens.array_record"  # this format detects damage when a record is read


class DamagedError(ValueError):
    """The folder's contents have changed since they were written."""


def seal(folder: pathlib.Path, facts: dict) -> None:
    """Writes the facts of a corpus, with hashes by which `TokenizedCorpus.load` detects damage."""
    sealed = {"facts": facts, **_hashes(folder), "records": (folder / RECORDS).stat().st_size}
    meta = {**sealed, "sha256": _hash(json.dumps(sealed).encode())}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    return {name: _hash((folder / name).read_bytes()) for name in ARRAYS}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _facts(folder: pathlib.Path) -> dict:
    """The facts that `seal` wrote, if the folder is unchanged since then."""
    meta = strict_json.read_object(folder / "meta.json")
    if meta.pop("sha256") != _hash(json.dumps(meta).encode()):
        raise ValueError("meta.json")
    for name, digest in _hashes(folder).items():
        if meta[name] != digest:
            raise ValueError(name)
    if meta["records"] != (folder / RECORDS).stat().st_size:
        raise ValueError(RECORDS)
    return meta["facts"]


class Records(Protocol):
    """Token records as `batches.py` reads them: a corpus, or a part of one."""

    @property
    def pairs(self) -> np.ndarray: ...

    @property
    def label_ids(self) -> Any: ...  # by record

    def tokens(self, record: int) -> np.ndarray: ...


class Counts(Protocol):
    """The counts of a text: bytes and documents for each label, and of each of the 256 bytes."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def pairs(self) -> np.ndarray: ...

    @property
    def label_ids(self) -> Any: ...

    @property
    def bytes_per_label(self) -> tuple[int, ...]: ...

    @property
    def byte_counts(self) -> tuple[int, ...]: ...


class Counted:
    """What follows from the counts of a text."""

    @property
    def num_tokens(self: Counts) -> int:
        return int(self.pairs.sum(dtype=np.int64))

    @property
    def bytes_per_token(self: Counts) -> dict[str, float]:
        """Mean bytes of text per predicted token, by label."""
        pairs = np.bincount(self.label_ids, weights=self.pairs, minlength=len(self.labels))
        rows = zip(self.labels, self.bytes_per_label, pairs, strict=True)
        return {label: num_bytes / num_pairs for label, num_bytes, num_pairs in rows}

    @property
    def byte_unigram_bits(self: Counts) -> float:
        """Entropy of the byte frequencies: bits per byte of a model that knows only these."""
        share = np.array(self.byte_counts) / max(sum(self.byte_counts), 1)
        return float(-sum(p * math.log2(p) for p in share if p))


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus(Counted):
    """Token records with random access, and facts about them that are stored separately."""

    folder: pathlib.Path
    labels: tuple[str, ...]
    pairs: np.ndarray  # the number of predicted tokens of each record
    label_ids: np.ndarray  # each record's index into `labels`
    bytes_per_label: tuple[int, ...]  # bytes of text
    documents_per_label: tuple[int, ...]
    byte_counts: tuple[int, ...]  # occurrences of each of the 256 bytes
    digest: str  # a hash of all tokens: equal tokens have equal digests, whatever the file names
    skipped: Mapping[str, int]  # records that could not be used, by reason

    @classmethod
    def load(cls, folder: pathlib.Path) -> "TokenizedCorpus":
        """The corpus in a folder; raises DamagedError if it has changed since it was written."""
        try:
            meta = _facts(folder)
        except Exception as error:  # damaged JSON text or arrays can raise any type
            stopping.pass_on(error)
            passing = isinstance(error, OSError | MemoryError)
            if passing and not isinstance(error, FileNotFoundError | EOFError):
                raise  # the files may be sound
            raise DamagedError(f"{folder} is damaged ({error!r})") from error
        return cls(
            folder=folder,
            labels=tuple(meta["labels"]),
            pairs=np.load(folder / "pairs.npy", mmap_mode="r"),
            label_ids=np.load(folder / "label_ids.npy", mmap_mode="r"),
            bytes_per_label=tuple(meta["bytes_per_label"]),
            documents_per_label=tuple(meta["documents_per_label"]),
            byte_counts=tuple(meta["byte_counts"]),
            digest=meta["digest"],
            skipped=meta["skipped"],
        )

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        return grain.sources.ArrayRecordDataSource(str(self.folder / RECORDS))

    def tokens(self, record: int) -> np.ndarray:
        """The tokens of a record; raises ValueError if it is damaged."""
        try:
            tokens = np.frombuffer(self._records[int(record)], np.uint32)
            if len(tokens) != self.pairs[record] + 1:
                raise ValueError(f"record {record}")
        except Exception as error:  # the reader has no exception class for damaged files
            stopping.pass_on(error)
            raise DamagedError(f"{self.folder} is damaged ({error}); delete the folder") from error
        return tokens
