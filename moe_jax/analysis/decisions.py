"""A routing folder: which experts a model chose for every token of a text, with their weights.

    meta.json      `Facts`, the digest of each file, and how many layers are finished
    tokens.npy     for each token: label, input id, target id (-1 where there is none), predicted id
    layer_03.npy   for each token: experts in order of falling weight, weights, and the router's
                   largest probabilities; one file for each sparse layer

Files are arrays of records that numpy maps into memory, so a reader holds only the tokens that it
looks at. Padding is left out. Strangers may have made a folder: nothing in it is trusted.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax import files, strict_json, untrusted

VERSION = 1
META, TOKENS = "meta.json", "tokens.npy"
MOST_PROBABILITIES = 3
MOST_LABELS = 1000
CHUNK = 1 << 16  # tokens that a reader holds at once
IDS = ("label", "input", "target", "predicted")
CHOICES = ("expert", "weight", "probability")


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that must agree before two folders are compared, or an unfinished one resumed.

    model, text: names, for people. layers: the indices of the sparse layers. num_experts_per_tok:
    the number of experts in a record; an expert equal to num_experts marks an unused slot.
    """

    model: str
    text: str
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    num_tokens: int
    model_digest: str
    text_digest: str

    def __post_init__(self):
        sizes = (self.num_hidden_layers, self.num_experts, self.num_experts_per_tok)
        sizes += (self.vocab_size, self.num_tokens)
        digests = (self.model_digest, self.text_digest)
        sound = (
            all(type(n) is int and 0 < n < 2**40 for n in sizes)
            and all(isinstance(text, str) for text in (self.model, self.text, *digests))
            and all(isinstance(label, str) for label in self.labels)
            and all(type(n) is int for n in self.layers)
            and list(self.layers) == sorted(set(self.layers) & set(range(self.num_hidden_layers)))
            and self.layers
            and max(self.num_experts, self.num_experts_per_tok) < 2**16
        )
        if not sound or not 0 < len(set(self.labels)) == len(self.labels):
            raise ValueError("its facts are not those of a routing folder")
        if len(self.labels) > MOST_LABELS:
            raise ValueError(
                f"{len(self.labels):,} labels are more than {MOST_LABELS:,}: group them, for "
                'example by the "language" of each record'
            )

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype([(name, np.int32) for name in IDS])

    @property
    def layer_dtype(self) -> np.dtype:
        expert = np.uint8 if self.num_experts < 2**8 else np.uint16
        A, P = self.num_experts_per_tok, min(MOST_PROBABILITIES, self.num_experts)
        kinds = (expert, (A,)), (np.float32, (A,)), (np.float32, (P,))
        return np.dtype([(name, *kind) for name, kind in zip(CHOICES, kinds, strict=True)])


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ids of some tokens; `target_N` is -1 where nothing follows."""

    label_N: np.ndarray
    input_N: np.ndarray
    target_N: np.ndarray
    predicted_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Choices:
    """The experts of some tokens in one layer, in order of falling weight."""

    expert_NA: np.ndarray
    weight_NA: np.ndarray
    probability_NP: np.ndarray


@dataclasses.dataclass(frozen=True)
class Decisions:
    """A finished routing folder; `num_dropped` counts the assignments beyond capacity by layer."""

    folder: pathlib.Path
    facts: Facts
    num_dropped: Mapping[int, int]
    _tokens: np.ndarray
    _layers: Mapping[int, np.ndarray]

    def tokens(self) -> Tokens:
        """The ids of all tokens, mapped."""
        return Tokens(*(self._tokens[name] for name in IDS))

    def chunks(self, layer: int, size: int = CHUNK) -> Iterator[tuple[Tokens, Choices]]:
        """Tokens and their experts in the sparse layer with this index, some tokens at a time."""
        for start in range(0, self.facts.num_tokens, size):
            part = slice(start, start + size)
            ids, own = self._tokens[part], self._layers[layer][part]
            arrays = (np.ascontiguousarray(own[name]) for name in CHOICES)
            yield Tokens(*(np.ascontiguousarray(ids[name]) for name in IDS)), Choices(*arrays)

    def stretches(self) -> np.ndarray:
        """[N]: the number of each token's stretch, which is the text of one document in one row.

        The tokens of a stretch are not independent, so it is the unit of intervals and tests. Two
        stretches count as one where the next token of the first happens to begin the second.
        """
        tokens = self.tokens()
        goes_on = tokens.target_N[:-1] == tokens.input_N[1:]
        goes_on &= tokens.label_N[:-1] == tokens.label_N[1:]
        return np.concatenate([[0], np.cumsum(~goes_on)])

    def check_same(self, **expected: object) -> None:
        """Raises: ValueError if these fields of `Facts` have other values here."""
        for name, value in expected.items():
            if (own := getattr(self.facts, name)) != value:
                shown = "" if name.endswith("digest") else f" ({short(own)}, not {short(value)})"
                raise ValueError(
                    f"{self.folder} is the routing of another {_WORDS[name]}{shown}; give one of "
                    "the same, or leave it out"
                )


_WORDS = {
    "text_digest": "text, tokenizer or sample",
    "model_digest": "model",
    "layers": "set of sparse layers",
    "num_experts": "number of experts",
    "num_experts_per_tok": "number of experts per token",
}


def short(value: object) -> str:
    """A name from a folder, for a line of text."""
    return untrusted.label(str(value))


def load(folder: str | pathlib.Path) -> Decisions:
    """The decisions in a folder; each file is compared with its digest and checked.

    Raises: ValueError, in one line, for a folder that is not finished, damaged, or something else.
    """
    folder = pathlib.Path(folder)
    untrusted.check_folder(folder)
    state = read_state(folder)
    if state is None:
        raise ValueError(f"{folder} has no {META}: it is not a folder of analyze --save_routing")
    facts = state.facts
    names = {layer: layer_file(layer) for layer in facts.layers}
    if missing := sorted({TOKENS, *names.values()} - state.digests.keys()):
        raise ValueError(
            f"{folder} is not finished ({missing[0]} is missing); run the same analyze again, "
            "which goes on where it stopped"
        )
    for name, digest in state.digests.items():
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is damaged or missing; remove the folder and record it anew"
            )
    tokens = _mapped(folder / TOKENS, facts.token_dtype, facts)
    layers = {n: _mapped(folder / name, facts.layer_dtype, facts) for n, name in names.items()}
    _check(folder, facts, tokens, layers)
    return Decisions(folder, facts, state.num_dropped, tokens, layers)


def _mapped(path: pathlib.Path, dtype: np.dtype, facts: Facts) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an array ({error}); record it anew") from None
    if array.dtype != dtype or array.shape != (facts.num_tokens,):
        raise ValueError(
            f"{path} holds {array.dtype}{list(array.shape)}, not {dtype}[{facts.num_tokens}]; "
            "record it anew"
        )
    return array


def _check(folder, facts: Facts, tokens, layers) -> None:
    """Ids index arrays of counts, so each of them must be in range."""
    V, limits = facts.vocab_size, {"label": (0, len(facts.labels))}
    for start in range(0, facts.num_tokens, CHUNK):
        part = slice(start, start + CHUNK)
        for name in IDS:
            least, end = limits.get(name, (-1 if name == "target" else 0, V))
            ids = tokens[part][name]
            if ids.min() < least or ids.max() >= end:
                raise ValueError(f"{folder / TOKENS}: a {name} id is not from {least} to {end - 1}")
        for layer, records in layers.items():
            if records[part]["expert"].max() > facts.num_experts:
                raise ValueError(f"{folder / layer_file(layer)} names an expert that is not there")


@dataclasses.dataclass(frozen=True)
class State:
    """What meta.json says: how many layers, dense ones too, are finished, and digests of files."""

    facts: Facts
    finished: int = 0
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_dropped: Mapping[int, int] = dataclasses.field(default_factory=dict)


def layer_file(layer: int) -> str:
    return f"layer_{layer:02d}.npy"


def read_state(folder: pathlib.Path) -> State | None:
    """What meta.json says; None if there is none. Raises: ValueError for a damaged one."""
    if not (path := folder / META).exists():
        return None
    try:
        sealed = strict_json.read_object(path)
        if sealed.pop("sha256") != seal(sealed):
            raise ValueError("its contents have changed since they were written")
        if sealed["version"] != VERSION:
            raise ValueError(f"it is of version {sealed['version']!r}, not {VERSION}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in sealed["facts"].items()
        }
        facts = Facts(**values)
        names = {TOKENS, *map(layer_file, facts.layers)}
        digests = {name: str(sealed["digests"][name]) for name in names & sealed["digests"].keys()}
        dropped = {int(layer): int(n) for layer, n in sealed["num_dropped"].items()}
        return State(facts, int(sealed["finished"]), digests, dropped)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); record it anew") from None


def write_state(folder: pathlib.Path, state: State) -> None:
    """Replaces meta.json; a program that is killed leaves either the old one or the new one."""
    plain = {"version": VERSION, **json.loads(strict_json.text(dataclasses.asdict(state)))}
    files.write_text(folder / META, strict_json.text({**plain, "sha256": seal(plain)}, indent=1))


def seal(plain: dict) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: pathlib.Path, dtype: np.dtype, number: int) -> Iterator[Callable]:
    """Gives a function that appends records to a new file, which appears whole at the end."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with files.whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (number,)})
        written = 0

        def append(records: np.ndarray) -> None:
            nonlocal written
            written += len(records)
            records.astype(dtype, copy=False).tofile(file)

        yield append
        file.flush()
        if written != number:
            raise RuntimeError(f"{path.name} got {written} of {number} records")


def digest_of(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
