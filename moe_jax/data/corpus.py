"""Random access to a prepared corpus: the token records of a split that `shards.py` wrote."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from moe_jax import files, stopping, strict_json

VERSION = 6  # of the format
MANIFEST = "manifest.json"  # it is written last, so a folder without it is unfinished
ARRAYS = ("pairs.npy", "label_ids.npy")
# The bit of a stored token that is not trained, such as a token of a prompt.
NO_LOSS = np.uint32(1 << 31)
# An array of this size or less is hashed when the corpus is opened (0.1 s); `verify` hashes all.
HASHED_BYTES = 1 << 27


# The words that say what makes a missing file again; nothing else need be removed.
MAKE = "prepare_data with the same options makes it again, or, in the cache, the next run"
CHANGED = "its content has changed since it was written"


class DamagedError(ValueError):
    """The folder's contents have changed since they were written."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of token records (ArrayRecord, which detects damage when a record is read)."""

    name: str
    records: int
    bytes: int
    sha256: str


def seal(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Writes the manifest: the facts of a corpus, and hashes by which damage is detected."""
    hashes = {name: hash_file(folder / name) for name in ARRAYS}
    sealed = {"version": VERSION, "facts": facts, "arrays": hashes}
    manifest = {**sealed, "sha256": _hash(sealed)}
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def hash_file(path: pathlib.Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The facts that `seal` wrote.

    Raises: DamagedError if the manifest has changed or is of another version.
    """
    path = folder / MANIFEST
    if folder.is_dir() and not path.exists():
        raise DamagedError(f"{folder} is unfinished: it has no {MANIFEST}; {MAKE}")
    with _naming(path):
        manifest = strict_json.read_object(path)
        if manifest.get("version", VERSION) != VERSION:
            raise ValueError(f"its format is version {manifest['version']}, not {VERSION}")
        if manifest.pop("sha256") != _hash(manifest):
            raise ValueError(CHANGED)
        return manifest["facts"] | {"arrays": manifest["arrays"]}


def in_shards(facts: Mapping[str, Any]) -> str:
    """The number of shards of a manifest's facts, in words."""
    number = len(facts["shards"])
    return "1 shard" if number == 1 else f"{number:,} shards"


class _naming:
    """Raises DamagedError for any error of the block that does not mean that the file is sound,
    because damaged JSON text or arrays can raise any type."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if not isinstance(error, Exception) or isinstance(error, DamagedError):
            return
        stopping.pass_on(error)
        passing = isinstance(error, OSError | MemoryError)
        if isinstance(error, FileNotFoundError):
            raise DamagedError(f"{self._path} is missing; {MAKE}") from error
        if not passing or isinstance(error, EOFError):
            reason = " ".join(str(error).split()) if type(error) is ValueError else CHANGED
            reason = reason.removeprefix(f"{self._path} ")[:200]
            raise DamagedError(
                f"{self._path} is damaged ({reason}); remove it, and {MAKE}"
            ) from error


class Records(Protocol):
    """Token records as `batches.py` reads them: a corpus, or a part of one."""

    @property
    def pairs(self) -> np.ndarray: ...

    @property
    def label_ids(self) -> Any: ...  # by record

    def tokens(self, record: int) -> np.ndarray: ...


class Counts(Protocol):
    """The counts of a text: bytes, documents and predicted tokens for each label, and of each of
    the 256 bytes."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def pairs_per_label(self) -> tuple[int, ...]: ...

    @property
    def bytes_per_label(self) -> tuple[int, ...]: ...

    @property
    def byte_counts(self) -> tuple[int, ...]: ...


class Counted:
    """Numbers that follow from the counts of a text."""

    @property
    def num_tokens(self: Counts) -> int:
        return sum(self.pairs_per_label)

    @property
    def bytes_per_token(self: Counts) -> dict[str, float]:
        """Mean bytes of text per predicted token, by label; 0 for one without any."""
        rows = zip(self.labels, self.bytes_per_label, self.pairs_per_label, strict=True)
        return {label: num_bytes / max(num_pairs, 1) for label, num_bytes, num_pairs in rows}

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
    pairs: np.ndarray  # the number of predicted tokens of each record, memory-mapped
    label_ids: np.ndarray  # each record's index into `labels`, memory-mapped
    pairs_per_label: tuple[int, ...]
    bytes_per_label: tuple[int, ...]  # bytes of text
    documents_per_label: tuple[int, ...]
    byte_counts: tuple[int, ...]  # occurrences of each of the 256 bytes
    digest: str  # a hash of all tokens and labels: equal ones have equal digests in any files
    tokenizer: str  # the tokenizer's fingerprint
    shards: tuple[Shard, ...]
    skipped: Mapping[str, int]  # records that could not be used, by reason
    weighted: bool  # some tokens are not trained

    @classmethod
    def load(cls, folder: pathlib.Path) -> "TokenizedCorpus":
        """The corpus in a folder, whose token records are not read.

        Raises: DamagedError if it has changed since it was written.
        """
        facts = read_manifest(folder)
        with _naming(folder / MANIFEST):
            shards = tuple(Shard(*shard) for shard in facts["shards"])
            records = sum(shard.records for shard in shards)
        pairs, label_ids = (_array(folder / name, records, facts["arrays"]) for name in ARRAYS)
        for shard in shards:
            with _naming(folder / shard.name):
                if (size := (folder / shard.name).stat().st_size) != shard.bytes:
                    raise ValueError(f"it has {size:,} bytes, not {shard.bytes:,}")
        with _naming(folder / MANIFEST):
            return cls(
                folder=folder,
                labels=tuple(facts["labels"]),
                pairs=pairs,
                label_ids=label_ids,
                pairs_per_label=tuple(facts["pairs_per_label"]),
                bytes_per_label=tuple(facts["bytes_per_label"]),
                documents_per_label=tuple(facts["documents_per_label"]),
                byte_counts=tuple(facts["byte_counts"]),
                digest=facts["digest"],
                tokenizer=facts["made_of"]["tokenizer"],
                shards=shards,
                skipped=facts["skipped"],
                weighted=facts["weighted"],
            )

    def verify(self) -> Iterator[int]:
        """Hashes all files; yields the bytes of each that is sound.

        Raises: DamagedError, with the file's name.
        """
        hashes = read_manifest(self.folder)["arrays"]
        for name, sha256 in [*hashes.items(), *((s.name, s.sha256) for s in self.shards)]:
            with _naming(self.folder / name):
                _check_hash(self.folder / name, sha256)
            yield (self.folder / name).stat().st_size

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        # With the ranges of the records, no file is opened before a record of it is read.
        paths = [f"{self.folder / shard.name}[0:{shard.records}]" for shard in self.shards]
        return grain.sources.ArrayRecordDataSource(paths)

    def tokens(self, record: int) -> np.ndarray:
        """The tokens of a record; raises ValueError if it is damaged."""
        tokens = self._stored(record)
        return tokens & ~NO_LOSS if self.weighted else tokens

    def weights(self, record: int) -> np.ndarray:
        """The loss weight of each predicted token of a record, 1 or 0."""
        return (self._stored(record)[1:] < NO_LOSS).astype(np.float32)

    def _stored(self, record: int) -> np.ndarray:
        try:
            tokens = np.frombuffer(self._records[int(record)], np.uint32)
            if len(tokens) != self.pairs[record] + 1:
                raise ValueError(f"it has not the {self.pairs[record] + 1} tokens of {ARRAYS[0]}")
        except Exception as error:  # the reader has no exception class for damaged files
            stopping.pass_on(error)
            ends = np.cumsum([shard.records for shard in self.shards])
            shard = int(np.searchsorted(ends, record, side="right"))
            own, path = record - ends[shard] + self.shards[shard].records, self.shards[shard].name
            reason = " ".join(str(error).split())[:200]
            raise DamagedError(
                f"{self.folder / path} is damaged at record {own} ({reason}); remove it, and {MAKE}"
            ) from error
        return tokens


def _array(path: pathlib.Path, records: int, hashes: Mapping[str, str]) -> np.ndarray:
    with _naming(path):
        array = np.load(path, mmap_mode="r")
        if array.shape != (records,) or array.dtype != np.int32:
            raise ValueError(f"it has not the {records:,} numbers of the manifest")
        if array.nbytes <= HASHED_BYTES:
            _check_hash(path, hashes[path.name])
        return array


def _check_hash(path: pathlib.Path, sha256: str) -> None:
    if hash_file(path) != sha256:
        raise ValueError(CHANGED)
