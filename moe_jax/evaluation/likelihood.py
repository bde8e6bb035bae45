"""Metrics of how probable a language model finds texts.

A *score* is a function of pairs (context, text) that returns each text's log-probability in nats
and its number of tokens. The end token of a text is not scored. Each function returns [K, 2], a
numerator and a denominator of each text; an empty text has zeros.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.evaluation import scoring
from moe_jax.evaluation.samples import Sample
from moe_jax.evaluation.subject import Subject

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


def under(load: Callable[[], Subject]) -> Score:
    """The score of pairs under the model that `load` returns, which is called when it is needed."""

    def score(pairs: list[tuple[str, str]]) -> list[tuple[float, int]]:
        subject = load()
        split = [token_pairs(subject.tokenizer, *pair, subject.limit) for pair in pairs]
        found = iter(subject.score([one for parts in split for one in parts]))
        scores = [[next(found) for _ in parts] for parts in split]
        return [
            (sum(s.log_likelihood for s in row), sum(s.num_tokens for s in row)) for row in scores
        ]

    return Remembered(score)


def token_pairs(tokenizer: Tokenizer, context: str, text: str, limit: int) -> list[scoring.Pair]:
    """The ids of a text, after those of its context as `generate` reads a prompt.

    The ids of a text are those of both strings together after the context's, or its own if the two
    strings together begin with other ids. A text beyond the model's limit is scored in windows; an
    empty one has no pair.
    """
    begin, both = tokenizer.prompt(context), tokenizer.prompt(context + text)
    joins = np.array_equal(both[: len(begin)], begin)
    ids = both[len(begin) :] if joins else tokenizer.encode(text)
    if not len(ids):
        return []
    first, *rest = scoring.windows(ids, tokenizer.bos_id, limit)
    return [dataclasses.replace(first, context=begin), *rest]
