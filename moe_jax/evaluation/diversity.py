"""Metrics of repetition, diversity, length and novelty, computed from the words of texts.

A function of single texts returns one row a text, [K, 2]: a numerator and a denominator. The metric
is the ratio of their sums, and a row of zeros is a text for which the metric is not defined. A
function of a set of texts returns a single row.
"""

import collections
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

LAST_WORDS = 128  # the l of rep/l
MAX_TEXTS = 100  # for self-BLEU, whose cost grows with the square of the number of texts
NOVEL_WORDS = 5  # the n of n-gram novelty
Words = Sequence[str]


def ngrams(words: Words, n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _rows(pairs: Iterable[tuple[float, float]]) -> np.ndarray:
    return np.array(list(pairs), np.float64).reshape(-1, 2)


def seq_rep(words_K: Sequence[Words], n: int) -> np.ndarray:
    """seq-rep-n: 1 - distinct n-grams / n-grams of each text, [K, 2] (Welleck et al.,
    arXiv 1908.04319). A text of fewer than n words has none."""

    def row(words: Words) -> tuple[float, float]:
        number = len(words) - n + 1
        return (1 - len(set(ngrams(words, n))) / number, 1) if number > 0 else (0, 0)

    return _rows(map(row, words_K))


def rep(words_K: Sequence[Words], last: int = LAST_WORDS) -> np.ndarray:
    """rep/l: of each text, the words that are among the `last` words before them, and all words,
    [K, 2] (Welleck et al., arXiv 1908.04319; there of a model's most probable tokens,
    which a greedy text consists of)."""

    def row(words: Words) -> tuple[int, int]:
        seen: dict[str, int] = {}  # word -> its last position
        repeated = 0
        for i, word in enumerate(words):
            repeated += i - seen.get(word, -last - 1) <= last
            seen[word] = i
        return repeated, len(words)

    return _rows(map(row, words_K))


def distinct(words_K: Sequence[Words], n: int) -> np.ndarray:
    """distinct-n: distinct n-grams of all texts together, and their n-grams, [1, 2] (Li et al.,
    arXiv 1510.03055). They divide by the number of words; divided by the number of
    n-grams, a text without repetition has 1, whatever its length."""
    counts = collections.Counter(gram for words in words_K for gram in ngrams(words, n))
    return _rows([(len(counts), counts.total())])


def self_bleu(words_K: Sequence[Words], seed: int = 0) -> np.ndarray:
    """BLEU-4 of each text, from 0 to 1, with all other texts as its references (Zhu et al.,
    arXiv 1802.01886), as sacrebleu computes it of sentences with an effective order; of at most
    `MAX_TEXTS` texts, drawn without replacement. Texts without words are left out."""
    from sacrebleu.metrics import bleu

    texts = [" ".join(words) for words in words_K if words]
    if len(texts) > MAX_TEXTS:
        drawn = np.random.default_rng(seed).choice(len(texts), MAX_TEXTS, replace=False)
        texts = [texts[i] for i in sorted(drawn)]
    if len(texts) < 2:
        return _rows([(0, 0)])
    scorer = bleu.BLEU(tokenize="none", effective_order=True, force=True)
    others = (texts[:i] + texts[i + 1 :] for i in range(len(texts)))
    scores = [scorer.sentence_score(t, o).score for t, o in zip(texts, others, strict=True)]
    return _rows((score / 100, 1) for score in scores)


def compression(texts: Sequence[str]) -> np.ndarray:
    """Bytes of all texts, a line each, and these bytes compressed by zlib at level 9, [1, 2]
    (Shaib et al., arXiv 2403.00553)."""
    whole = "\n".join(filter(None, texts)).encode()
    return _rows([(len(whole), len(zlib.compress(whole, 9)) if whole else 0)])


def mean(values_K: Iterable[float]) -> np.ndarray:
    return _rows((value, 1) for value in values_K)


def median(values_K: Sequence[float]) -> np.ndarray:
    return _rows([(float(np.median(values_K)), 1)])


def novelty(
    words_K: Sequence[Words], training_words: Iterable[Words], n: int = NOVEL_WORDS
) -> np.ndarray:
    """Counts, for each text, the n-grams that the training text does not have, and all, [K, 2]
    (McCoy et al., arXiv 2111.09509).

    The training text is read once. Memory holds the n-grams of the generated texts only, so the
    count is exact for a training text of any size.
    """
    unseen = {gram for words in words_K for gram in ngrams(words, n)}
    for words in training_words:
        unseen.difference_update(ngrams(words, n))
    grams_K = (list(ngrams(words, n)) for words in words_K)
    return _rows((sum(gram in unseen for gram in grams), len(grams)) for grams in grams_K)
