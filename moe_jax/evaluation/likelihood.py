"""Metrics of how probable a language model finds texts.

A *score* is a function of pairs (context, text) that returns each text's log-probability in nats
and its number of tokens. The end token of a text is not scored. Each function returns [K, 2], a
numerator and a denominator of each text; an empty text has zeros.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from moe_jax.evaluation.samples import Sample

Score = Callable[[list[tuple[str, str]]], list[tuple[float, int]]]


def after_prompt(samples: Sequence[Sample], score: Score) -> np.ndarray:
    """The negative log-likelihood of a text after its prompt, in nats, and its tokens. The
    exponential of the ratio is the perplexity."""
    rows = score([(sample.prompt or "", sample.text) for sample in samples])
    return np.array([(-nats, tokens) for nats, tokens in rows], np.float64)


def bits_per_byte(samples: Sequence[Sample], score: Score) -> np.ndarray:
    """The same in bits, and the text's bytes, so that models with different tokenizers compare."""
    bits_K = after_prompt(samples, score)[:, 0] / math.log(2)
    bytes_K = [len(sample.text.encode()) for sample in samples]
    return np.stack([bits_K, np.array(bytes_K, np.float64)], axis=1)


def given_source(samples: Sequence[Sample], score: Score) -> np.ndarray:
    """The mean log-probability of a text's tokens given its source, and 1: BARTScore (Yuan et al.,
    arXiv 2106.11520) with equal weights, of a decoder that reads the source on a line before the
    text. The prompt stands for a missing source; a text with neither has zeros."""
    known = [s.source is not None or s.prompt is not None for s in samples]
    contexts = [s.prompt or "" if s.source is None else f"{s.source}\n" for s in samples]
    rows = score([(context, s.text) for context, s in zip(contexts, samples, strict=True)])
    means = [
        (nats / tokens, 1) if tokens and has else (0, 0)
        for (nats, tokens), has in zip(rows, known, strict=True)
    ]
    return np.array(means, np.float64)


class Remembered:
    """A function of a list, item by item, that is called only for items that it has not seen."""

    def __init__(self, function: Callable[[list], list]):
        self._function = function
        self._found: dict[Hashable, object] = {}

    def __call__(self, items: Sequence) -> list:
        new = [item for item in dict.fromkeys(items) if item not in self._found]
        if new:
            self._found.update(zip(new, self._function(new), strict=True))
        return [self._found[item] for item in items]
