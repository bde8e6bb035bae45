"""Pairs of a chosen and a rejected answer to one prompt, as records and rows.

Records 2i and 2i + 1 are pair i: the prompt with its chosen answer, and with its rejected one. A
row holds one pair, as its segments 1 and 2, so a pair is never split over devices or microbatches.
A record without targets stands for an answer that nobody wrote.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable

import grain
import numpy as np

from moe_jax import files, strict_json
from moe_jax.data import chat, chat_pairs, policy, sources
from moe_jax.data.batches import Columns
from moe_jax.data.cache import DATASETS, writing
from moe_jax.data.document import Document
from moe_jax.data.packing import Piece
from moe_jax.data.policy import STRICT, Reading, Skipped
from moe_jax.data.recent import Recent
from moe_jax.data.tokenizers import Tokenizer

FORMAT = 1  # the version of the cache's format, a part of its key
ARRAYS = ("tokens", "ends", "answers")
CUT, LEFT_OUT = "prompts cut", "left out"


def pair_rows(
    prompt_ids: np.ndarray,
    chosen_ids: np.ndarray | None,
    rejected_ids: np.ndarray | None,
    sequence_length: int,
) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int], bool] | None:
    """The two records of a pair, which fit together into a row, each with the index of its answer.

    A long prompt loses tokens after its first, the same ones in both records; answers are never
    cut. The ids are what the model reads: the prompt begins with the begin token, or what a chat
    template begins with, and an answer ends with the end of its turn.

    Returns: (tokens, index of the answer) of the chosen and of the rejected answer, and whether the
      prompt was cut; None for a pair whose answers do not fit with one token of the prompt.
    """
    answers = [ids for ids in (chosen_ids, rejected_ids) if ids is not None]
    # A record of p prompt and a answer tokens has p + a - 1 targets.
    most = (sequence_length + len(answers) - sum(map(len, answers))) // len(answers)
    if most < 1 or not len(prompt_ids):
        return None
    cut = len(prompt_ids) > most
    kept = np.concatenate([prompt_ids[:1], prompt_ids[len(prompt_ids) - most + 1 :]])
    prompt = (kept if cut else np.asarray(prompt_ids)).astype(np.uint32)

    def record(ids: np.ndarray | None) -> tuple[np.ndarray, int]:
        if ids is None:
            return prompt[:1], 1
        return np.concatenate([prompt, ids]).astype(np.uint32), len(prompt)

    return record(chosen_ids), record(rejected_ids), cut


@dataclasses.dataclass(frozen=True)
class PairCorpus:
    """Pairs with random access to their records, as `batches` reads them.

    tokens_X: the tokens of all records; ends_R: where each record ends there; answers_R: the index
    of each record's first answer token. reference_X: log-probabilities of the tokens under a
    reference model, 0 outside the answers; None if they were not computed.
    """

    tokens_X: np.ndarray
    ends_R: np.ndarray
    answers_R: np.ndarray
    counts: dict[str, int]  # "pairs", "prompts cut", "left out"
    digest: str  # a hash of all tokens and of where the answers begin
    reference_X: np.ndarray | None = None

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """The number of targets of each record."""
        return np.diff(self.ends_R, prepend=0) - 1

    @property
    def label_ids(self) -> np.ndarray:
        return np.broadcast_to(np.int32(0), len(self.ends_R))

    @property
    def unpaired(self) -> int:
        """The number of pairs without one of their answers."""
        return int(np.sum(self.pairs == 0))

    def tokens(self, record: int) -> np.ndarray:
        return self.tokens_X[self._span(record)]

    def weights(self, record: int) -> np.ndarray:
        """1 for each target in the answer, 0 for those in the prompt."""
        return (np.arange(1, self.pairs[record] + 1) >= self.answers_R[record]).astype(np.float32)

    def reference(self, record: int) -> np.ndarray:
        assert self.reference_X is not None
        return self.reference_X[self._span(record)][1:]

    @property
    def columns(self) -> Columns:
        """The arrays of a batch that do not follow from the tokens."""
        known = {} if self.reference_X is None else {"reference_BT": self.reference}
        return {"weights_BT": self.weights, **known}

    def _span(self, record: int) -> slice:
        end = int(self.ends_R[record])
        return slice(end - int(self.pairs[record]) - 1, end)


class PairPlan:
    """Rows of one pair each, all pairs once an epoch, in an order seeded by (seed, epoch).

    `shuffled=False` keeps the pairs' own order.
    """

    def __init__(
        self, pairs: np.ndarray, *, sequence_length: int, seed: int, shuffled: bool = True
    ):
        self._pairs, self.sequence_length, self._seed = pairs, sequence_length, seed
        self.rows_per_epoch, self._shuffled = len(pairs) // 2, shuffled
        self._order = Recent(self._order_of_epoch, 2)

    def row(self, g: int) -> list[Piece]:
        """The pieces of row g: both records of a pair."""
        epoch, index = divmod(g, self.rows_per_epoch)
        pair = int(self._order(epoch)[index]) if self._shuffled else index
        return [Piece(record, 0, int(self._pairs[record])) for record in (2 * pair, 2 * pair + 1)]

    def _order_of_epoch(self, epoch: int) -> grain.MapDataset:
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        return grain.MapDataset.range(self.rows_per_epoch).seed(seed).shuffle()


def open_pairs(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    validation_fraction: float,
    cache: pathlib.Path,
    reading: Reading = STRICT,
    form: chat.Form | None = None,
) -> PairCorpus:
    """The pairs of a split as records, from the folder `cache` if it has them.

    `form` says how conversations become tokens.

    Raises: ValueError if the split has no pairs that fit into a row, or a document is none.
    """
    datasets = cache / DATASETS
    content = sources.fingerprint(source, datasets)
    key = [FORMAT, content, split, validation_fraction, tokenizer.fingerprint, sequence_length]
    key += [reading.key, *([form.key] if form else [])]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    folder = cache / "pairs" / name
    if not folder.exists():
        skipped = Skipped(reading.skip_damaged)
        documents = sources.documents(
            source,
            split,
            validation_fraction=validation_fraction,
            data_dir=datasets,
            reading=reading,
            skipped=skipped,
        )
        found = of_documents(documents, tokenizer, sequence_length, form, skipped)
        found.counts.update(skipped.by_reason)
        if not found.counts["pairs"]:
            lost = f"; {skipped.in_words}" if skipped.by_reason else ""
            raise ValueError(
                f"data.source={source!r} has no {split} pairs that fit into rows of "
                f"{sequence_length} tokens ({found.counts[LEFT_OUT]} do not fit{lost}); raise "
                "data.sequence_length, or set data.validation_fraction to another value"
            )
        with writing(cache), files.whole_folder(folder, shared=True) as unfinished:
            for array in ARRAYS:
                np.save(unfinished / f"{array}.npy", vars(found)[f"{array}_{_AXES[array]}"])
            facts = {"counts": found.counts, "digest": found.digest}
            files.write_text(unfinished / "meta.json", json.dumps(facts))
    return load(folder)


_AXES = {"tokens": "X", "ends": "R", "answers": "R"}


def load(folder: pathlib.Path) -> PairCorpus:
    """The pairs in a folder; raises ValueError if it has changed since it was written."""
    try:
        meta = strict_json.read_object(folder / "meta.json")
        tokens_X, ends_R, answers_R = (
            np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS
        )
        if _digest(tokens_X, ends_R, answers_R) != meta["digest"]:
            raise ValueError("its arrays are not those of meta.json")
        return PairCorpus(tokens_X, ends_R, answers_R, meta["counts"], meta["digest"])
    except (ValueError, KeyError, TypeError, EOFError, FileNotFoundError) as error:
        reason = "" if isinstance(error, KeyError) else f" ({' '.join(str(error).split())[:200]})"
        raise ValueError(
            f"{folder} is damaged{reason}; delete the folder, and the next run makes it again"
        ) from error


def of_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    sequence_length: int,
    form: chat.Form | None = None,
    skipped: Skipped | None = None,
) -> PairCorpus:
    """The pairs of documents that have a `preference`.

    Conversations are tokenized as `form` says. The prompt and the answers of plain strings are
    tokenized apart, so that a token is of one of them. `skipped` counts documents that cannot be
    tokenized.

    Raises: ValueError for a document without a preference, and for one that cannot be tokenized.
    """
    skipped = skipped or Skipped(0)
    records: list[tuple[np.ndarray, int]] = []
    counts = collections.Counter({"pairs": 0, CUT: 0, LEFT_OUT: 0})

    for document in documents:
        try:
            made = pair_rows(*_ids(document, tokenizer, form), sequence_length)
        except policy.UnusableError as error:
            skipped.add(policy.refusal(f"{document.text[:40]!r} …", error))
            continue
        counts.update([LEFT_OUT] if made is None else ["pairs", *[CUT] * made[2]])
        records += made[:2] if made else ()
    tokens_X = np.concatenate([tokens for tokens, _ in records] or [np.zeros(0, np.uint32)])
    ends_R = np.cumsum([len(tokens) for tokens, _ in records], dtype=np.int64)
    answers_R = np.array([answer for _, answer in records], np.int32)
    return PairCorpus(
        *(tokens_X, ends_R, answers_R), dict(counts), _digest(tokens_X, ends_R, answers_R)
    )


def _ids(
    document: Document, tokenizer: Tokenizer, form: chat.Form | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The tokens of the prompt, of the chosen and of the rejected answer.

    Raises: ValueError as `of_documents` does.
    """
    given = document.preference
    if isinstance(given, chat_pairs.Pair):
        assert form is not None
        special = tuple(tokenizer.special_tokens)
        try:
            return chat_pairs.ids(given, form, tokenizer.with_offsets, special)
        except ValueError as error:
            raise policy.UnusableError(str(error), "answers without tokens of their own") from None
    if given is None:
        raise policy.UnusableError(
            ' is no pair; give "prompt", "chosen" and "rejected", or '
            'config.objective.name="next_token" for text',
            "no pair",
        )

    def answer(text: str | None) -> np.ndarray | None:
        return None if text is None else np.append(tokenizer.encode(text), tokenizer.eos_id)

    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(given.prompt)])
    return prompt, answer(given.chosen), answer(given.rejected)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
