"""The table of filters: `prepare_data --filter=NAME[:ARGUMENT]` chooses rows.

A document that a filter drops is counted under the filter's name.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax import spelling
from moe_jax.data.document import Document

TEXT, TOKENS, OTHERS = "the text", "the tokens", "other documents"
# Letters of scripts that do not separate words by spaces: Thai, Lao, Burmese, Khmer, kana, Chinese.
ALONE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{ALONE}]|[^\s{ALONE}]+")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("\u2022", "-", "*", "\u2023", "\u25cf", "\u00b7")
MOST_PERIOD = 13
SHINGLE_WORDS, PERMUTATIONS = 5, 128


@dataclasses.dataclass(frozen=True)
class Filter:
    """A row: how documents are judged, and what the argument is.

    `judge(argument)` returns a function: from a document (TEXT), or a document and its tokens
    (TOKENS), to True if it is kept; or (OTHERS) from a document to keys, of which an earlier
    document has none.
    """

    explanation: str
    reads: str
    judge: Callable[[str], Callable[..., Any]]
    default: str | None = None  # the argument if there is none; None if there must be one
    extra: str = ""  # the package that it needs
    # Its keys of the documents that it drops do not count, so it must see documents in order.
    in_order: bool = False


def _within(measure: Callable[..., float]) -> Callable[[str], Callable[..., bool]]:
    """The judge of filters whose argument "LEAST,MOST" bounds a measure; an end may be empty."""

    def judge(argument: str):
        ends = argument.split(",")
        if len(ends) != 2:
            raise ValueError("its argument is LEAST,MOST, of which one may be empty")
        low, high = float(ends[0] or "-inf"), float(ends[1] or "inf")
        if low > high:
            raise ValueError(f"its least number, {low:g}, is above its most, {high:g}")
        return lambda *read: low <= measure(*read) <= high

    return judge


def _languages(argument: str):
    wanted = frozenset(argument.split(","))
    return lambda document: document.label in wanted


def _words(document: Document) -> list[str]:
    return document.text.split()


def _share(condition: Callable[[str], bool], parts: Sequence[str]) -> float:
    return sum(map(condition, parts)) / max(len(parts), 1)


def _mean_word_length(document: Document) -> float:
    words = _words(document)
    return sum(map(len, words)) / max(len(words), 1)


def _symbols(document: Document) -> float:
    text = document.text
    ellipses = text.count("...") + text.count("\u2026")
    return max(text.count("#"), ellipses) / max(len(_words(document)), 1)


def _lines(document: Document) -> list[str]:
    return [line for part in document.text.splitlines() if (line := part.strip())]


def _stop_words(document: Document) -> float:
    return len(STOP_WORDS & set(document.text.lower().split()))


def most_repetitions(ids_N: np.ndarray, most_period: int = MOST_PERIOD) -> int:
    """The most times that an n-gram of 1 to `most_period` tokens follows itself, the first one
    included."""
    most = min(1, len(ids_N))
    for period in range(1, min(most_period, len(ids_N) - 1) + 1):
        differs = np.flatnonzero(ids_N[period:] != ids_N[:-period])
        ends = np.concatenate([[-1], differs, [len(ids_N) - period]])
        most = max(most, (int(np.diff(ends).max()) - 1) // period + 1)
    return most


def _repeats(argument: str):
    limit = int(argument)
    return lambda document, ids: most_repetitions(ids) < limit


def _exact(argument: str):
    del argument
    return lambda document: [_hash(document.text.encode())]


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _near(argument: str):
    import datasketch

    threshold = float(argument)
    if not 0 < threshold < 1:
        raise ValueError("its argument is a similarity between 0 and 1")
    bands = datasketch.MinHashLSH(threshold, PERMUTATIONS)  # chooses the number of bands
    return functools.partial(_near_keys, datasketch.MinHash, bands.b, bands.r)


def _near_keys(sketch, bands: int, rows: int, document: Document) -> list[bytes]:
    words = WORD.findall(document.text.lower())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    found = sketch(PERMUTATIONS)
    shingles = {" ".join(words[start : start + SHINGLE_WORDS]) for start in starts}
    found.update_batch([shingle.encode() for shingle in sorted(shingles)])
    values = np.asarray(found.hashvalues, "<u8")
    parts = (values[band * rows : (band + 1) * rows].tobytes() for band in range(bands))
    return [_hash(bytes([band]) + part) for band, part in enumerate(parts)]


def _bounds(explanation: str, measure: Callable[..., float], default: str | None = None) -> Filter:
    return Filter(f"{explanation}, within LEAST,MOST", TEXT, _within(measure), default)


FILTERS = {
    "language": Filter("keeps documents with one of these labels, as in en,fr", TEXT, _languages),
    "characters": _bounds("number of characters", lambda d: len(d.text)),
    "words": _bounds("number of words between spaces", lambda d: len(_words(d)), "50,100000"),
    "mean_word_length": _bounds("characters per word", _mean_word_length, "3,10"),
    "symbols": _bounds("# or ellipses, per word", _symbols, ",0.1"),
    "letters": _bounds(
        "share of words with a letter",
        lambda d: _share(lambda word: any(map(str.isalpha, word)), _words(d)),
        "0.8,",
    ),
    "bullets": _bounds(
        "share of lines that begin with a bullet",
        lambda d: _share(lambda line: line.startswith(BULLETS), _lines(d)),
        ",0.9",
    ),
    "ellipses": _bounds(
        "share of lines that end with an ellipsis",
        lambda d: _share(lambda line: line.endswith(("...", "\u2026")), _lines(d)),
        ",0.3",
    ),
    "stop_words": _bounds(
        f"number of different words of {', '.join(sorted(STOP_WORDS))}", _stop_words, "2,"
    ),
    "tokens": Filter(
        "number of tokens, within LEAST,MOST", TOKENS, _within(lambda document, ids: len(ids))
    ),
    # OLMoE (arXiv 2409.02060, section 2) drops documents with an n-gram of 1 to 13 tokens 32 times
    # or more in sequence.
    "repeated_ngrams": Filter(
        f"keeps documents in which no n-gram of 1 to {MOST_PERIOD} tokens follows itself so often",
        TOKENS,
        _repeats,
        "32",
    ),
    "exact_duplicates": Filter("keeps the first of equal texts", OTHERS, _exact, ""),
    "near_duplicates": Filter(
        f"keeps the first of texts whose sets of {SHINGLE_WORDS}-grams of words have about this "
        f"Jaccard similarity (MinHash of {PERMUTATIONS} permutations, locality-sensitive hashing)",
        OTHERS,
        _near,
        "0.8",
        extra="datasketch",
        in_order=True,
    ),
}
# The quality rules of MassiveWeb (Gopher, arXiv 2112.11446, appendix A.1.1), made for English.
GROUPS = {
    "gopher": (
        *("words", "mean_word_length", "symbols", "letters", "bullets", "ellipses", "stop_words"),
    )
}


class Chosen:
    """The filters that specs NAME[:ARGUMENT] choose.

    Raises: ValueError, with the spec.
    """

    def __init__(self, specs: Iterable[str] = ()):
        self.specs = tuple(specs)
        self._judges: dict[str, list[tuple[str, Callable]]] = {TEXT: [], TOKENS: [], OTHERS: []}
        self.in_order: list[str] = []  # the names of filters that must see documents in order
        for spec in specs:
            name, _, argument = spec.partition(":")
            for member in GROUPS.get(name, (name,)):
                self._add(spec, member, argument)

    def _add(self, spec: str, name: str, argument: str) -> None:
        if name not in FILTERS:
            raise ValueError(spelling.unknown("--filter", name, [*FILTERS, *GROUPS]))
        row = FILTERS[name]
        if not argument and row.default is None:
            raise ValueError(f"--filter={spec} needs an argument: {row.explanation}")
        try:
            judge = row.judge(argument or row.default or "")
        except ModuleNotFoundError:
            raise ValueError(
                f"--filter={spec} needs the package {row.extra}, an optional extra of this "
                "project: pip install 'moe_jax[prepare]'"
            ) from None
        except ValueError as error:
            raise ValueError(f"--filter={spec}: {error}") from error
        self._judges[row.reads].append((name, judge))
        self.in_order += [name] if row.in_order else []

    def fault_of_text(self, document: Document) -> str | None:
        """The name of the first filter of the text that drops the document."""
        return next((name for name, keeps in self._judges[TEXT] if not keeps(document)), None)

    def fault_of_tokens(self, document: Document, ids: np.ndarray) -> str | None:
        """The name of the first filter of the tokens that drops the document."""
        judges = self._judges[TOKENS]
        return next((name for name, keeps in judges if not keeps(document, ids)), None)

    @property
    def compares(self) -> bool:
        """True if a document may be dropped because of another."""
        return bool(self._judges[OTHERS])

    def keys(self, document: Document) -> list[tuple[str, list[bytes]]]:
        """For each filter that compares documents, its name and the document's keys."""
        return [(name, keys(document)) for name, keys in self._judges[OTHERS]]


NONE = Chosen()
choose = functools.lru_cache(maxsize=8)(Chosen)
