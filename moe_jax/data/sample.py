"""A bounded part of a corpus in which every label has the same number of tokens."""

import dataclasses

import numpy as np

from moe_jax.data.corpus import TokenizedCorpus


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some records of a corpus, read like the corpus; the last one of a label may be cut short."""

    corpus: TokenizedCorpus
    records: np.ndarray  # their numbers in the corpus
    pairs: np.ndarray  # the number of predicted tokens of each record

    @property
    def labels(self) -> tuple[str, ...]:
        return self.corpus.labels

    @property
    def label_ids(self) -> np.ndarray:
        return self.corpus.label_ids[self.records]

    def tokens(self, record: int) -> np.ndarray:
        return self.corpus.tokens(self.records[record])[: self.pairs[record] + 1]


def balanced(corpus: TokenizedCorpus, most_tokens: int, *, seed: int = 0) -> Sample:
    """A sample of at most `most_tokens` predicted tokens, from records drawn at random per label.

    Each label has the same number of tokens, except those that have too few in all: they are taken
    whole, and the others share what is left.
    """
    label_ids = np.asarray(corpus.label_ids)
    available_G = np.bincount(label_ids, weights=corpus.pairs, minlength=len(corpus.labels))
    level = _level(available_G.astype(np.int64), most_tokens)
    chosen, kept = [], []
    for label in range(len(corpus.labels)):
        own = np.flatnonzero(label_ids == label)
        own = np.random.default_rng([seed, label]).permutation(own)
        pairs = np.asarray(corpus.pairs)[own].astype(np.int64)
        before = np.cumsum(pairs) - pairs
        left = np.minimum(pairs, level - before)
        chosen.append(own[left > 0])
        kept.append(left[left > 0])
    return Sample(corpus, np.concatenate(chosen), np.concatenate(kept).astype(np.int32))


def _level(available_G: np.ndarray, most: int) -> int:
    """The largest level with sum(min(available, level)) <= most; the largest number if all fit."""
    left, number = most, len(available_G)
    for available in sorted(available_G.tolist()):
        if available * number > left:
            return left // number
        left, number = left - available, number - 1
    return int(available_G.max())
