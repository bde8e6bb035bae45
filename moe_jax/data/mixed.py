"""The records of several corpora, one after another, read as those of one."""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.data.batches import Columns
from moe_jax.data.corpus import Counted, TokenizedCorpus


@dataclasses.dataclass(frozen=True)
class OfLabel:
    """The records of a corpus that have one label; it holds their numbers and lengths."""

    corpus: TokenizedCorpus
    label_id: int

    @functools.cached_property
    def records(self) -> np.ndarray:
        return np.flatnonzero(np.asarray(self.corpus.label_ids) == self.label_id)

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        return np.asarray(self.corpus.pairs)[self.records]

    @property
    def num_tokens(self) -> int:
        return self.corpus.pairs_per_label[self.label_id]

    @property
    def label_ids(self) -> np.ndarray:
        return np.broadcast_to(np.int32(0), len(self.records))

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.corpus.labels[self.label_id],)

    @property
    def documents_per_label(self) -> tuple[int, ...]:
        return (self.corpus.documents_per_label[self.label_id],)

    def tokens(self, record: int) -> np.ndarray:
        return self.corpus.tokens(self.records[record])

    @property
    def weighted(self) -> bool:
        return self.corpus.weighted

    def weights(self, record: int) -> np.ndarray:
        return self.corpus.weights(self.records[record])


@dataclasses.dataclass(frozen=True)
class MixedRecords:
    """The records of sources, by name; only `pairs` copies a number of each of them."""

    sources: Mapping[str, TokenizedCorpus | OfLabel]

    @functools.cached_property
    def _parts(self) -> list[TokenizedCorpus | OfLabel]:
        return list(self.sources.values())

    @functools.cached_property
    def first_record(self) -> dict[str, int]:
        """The number of each source's first record."""
        sizes = [len(part.label_ids) for part in self._parts]
        firsts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()][:-1]
        return dict(zip(self.sources, firsts, strict=True))

    @functools.cached_property
    def _firsts(self) -> list[int]:
        return list(self.first_record.values())

    def locate(self, record: int) -> tuple[int, int]:
        """The index of a record's source, and the record's number in that source."""
        index = bisect.bisect_right(self._firsts, record) - 1
        return index, record - self._firsts[index]

    def tokens(self, record: int) -> np.ndarray:
        """The tokens of a record; raises ValueError if it is damaged."""
        index, own = self.locate(record)
        return self._parts[index].tokens(own)

    def weights(self, record: int) -> np.ndarray:
        """The loss weight of each predicted token of a record."""
        index, own = self.locate(record)
        return self._parts[index].weights(own)

    @property
    def weighted(self) -> bool:
        """True if some tokens are not trained."""
        return any(part.weighted for part in self._parts)

    def columns(self, *, per_document: bool = False) -> Columns:
        """The loss weights, if they are not 1: for `per_document`, those of a record sum to 1."""

        def shares(record: int) -> np.ndarray:
            weights = self.weights(record)
            return weights / max(weights.sum(), 1)

        chosen = shares if per_document else self.weights
        return {"weights_BT": chosen} if self.weighted or per_document else {}

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        return np.concatenate([part.pairs for part in self._parts])

    @functools.cached_property
    def label_ids(self) -> "_LabelIds":
        return _LabelIds(self._parts, self.locate)


@dataclasses.dataclass(frozen=True)
class MixedText(MixedRecords, Counted):
    """The text of several corpora.

    A label is "source/label", or "source" for a source with one label; a single source's labels are
    its own.
    """

    sources: Mapping[str, TokenizedCorpus]

    @functools.cached_property
    def labels_of(self) -> dict[str, tuple[str, ...]]:
        """The labels of each source."""
        found = {name: part.labels for name, part in self.sources.items()}
        if len(found) == 1:
            return found
        return {
            name: tuple(f"{name}/{label}" for label in labels) if len(labels) > 1 else (name,)
            for name, labels in found.items()
        }

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for labels in self.labels_of.values() for label in labels)

    @property
    def pairs_per_label(self) -> tuple[int, ...]:
        return tuple(n for text in self.sources.values() for n in text.pairs_per_label)

    @property
    def bytes_per_label(self) -> tuple[int, ...]:
        return tuple(n for text in self.sources.values() for n in text.bytes_per_label)

    @property
    def documents_per_label(self) -> tuple[int, ...]:
        return tuple(n for text in self.sources.values() for n in text.documents_per_label)

    @property
    def byte_counts(self) -> tuple[int, ...]:
        return tuple(np.sum([text.byte_counts for text in self.sources.values()], axis=0).tolist())


class _LabelIds:
    """The label id of each record, looked up in its source."""

    def __init__(self, parts, locate):
        self._parts, self._locate = parts, locate
        self._first = [0, *np.cumsum([len(part.labels) for part in parts]).tolist()]

    def __getitem__(self, record: int) -> int:
        index, own = self._locate(record)
        return self._first[index] + int(self._parts[index].label_ids[own])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        pairs = zip(self._first, self._parts, strict=False)
        whole = np.concatenate([first + np.asarray(part.label_ids) for first, part in pairs])
        return np.asarray(whole, dtype)


def by_label(corpora: Mapping[str, TokenizedCorpus]) -> Iterator[tuple[str, OfLabel]]:
    """Each label of each corpus as a source: "label" of a single corpus, or "source/label"."""
    for name, corpus in corpora.items():
        for label_id, label in enumerate(corpus.labels):
            yield f"{name}/{label}" if name else label, OfLabel(corpus, label_id)
