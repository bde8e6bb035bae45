"""Turns text into token records: each document is tokenized once and cached."""

import collections
import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import tqdm
from array_record.python import array_record_module

from moe_jax import files
from moe_jax.data import corpus, sources, text_files, tokenizers
from moe_jax.data.cache import DATASETS, writing
from moe_jax.data.corpus import DamagedError, TokenizedCorpus
from moe_jax.data.document import Document
from moe_jax.data.policy import STRICT, Reading, Skipped
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.parallel import distributed

FORMAT = 5  # the version of the cache's format, a part of its key
RECORD_TOKENS = 65_536  # a longer document is split into several records


def open_corpus(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache: pathlib.Path,
    reading: Reading = STRICT,
) -> TokenizedCorpus:
    """The tokenized documents of a split, from the folder `cache` if it has them.

    The cache stores them under a hash of text, tokenizer and options.

    Raises: ValueError if the split is empty or the source cannot be used.
    """
    datasets = cache / DATASETS
    content = sources.fingerprint(source, datasets)
    key = [FORMAT, content, split, validation_fraction, tokenizer.fingerprint, reading.key]
    folder = cache / "tokens" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if folder.exists():
        try:
            return TokenizedCorpus.load(folder)
        except DamagedError as error:
            distributed.say(f"{error}; it is made anew")
            files.remove_folder(folder)
    skipped = Skipped(reading.skip_damaged)
    documents = sources.documents(
        source,
        split,
        validation_fraction=validation_fraction,
        data_dir=datasets,
        reading=reading,
        skipped=skipped,
    )
    with writing(cache), files.whole_folder(folder, shared=True) as unfinished:
        num_records = _tokenize(documents, tokenizer, unfinished, f"{source} {split}", skipped)
        if not num_records:
            raise ValueError(
                f"data.source={source!r} has no {split} documents; set config.data."
                "validation_fraction to another value, or give more text: each record "
                f"and {text_files.PART_CHARACTERS:,} characters of .txt are one document"
            )
        if sources.fingerprint(source, datasets) != content:
            raise ValueError(f"data.source={source!r} changed while it was read; run again")
    return TokenizedCorpus.load(folder)


def of_digest(digest: str, cache: pathlib.Path) -> TokenizedCorpus | None:
    """The corpus of the folder `cache` with this hash of its tokens; None if there is none."""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return None
    for path in sorted((cache / "tokens").glob("*/meta.json")):
        with contextlib.suppress(DamagedError, OSError, UnicodeDecodeError):
            if digest in path.read_text(encoding="utf-8"):
                found = TokenizedCorpus.load(path.parent)
                if found.digest == digest:
                    return found
    return None


def _tokenize(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    name: str,
    skipped: Skipped,
) -> int:
    """Writes tokens, lengths and counts; returns the number of records."""
    pairs, label_ids = [], []
    # Label -> its number of documents and number of bytes of text, in the order of `label_ids`.
    counts = collections.defaultdict[str, np.ndarray](lambda: np.zeros(2, np.int64))
    byte_counts, digest = np.zeros(256, np.int64), hashlib.sha256()
    path = str(folder / corpus.RECORDS)
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for document in tqdm.tqdm(documents, f"tokenizing {name}", unit=" documents", disable=None):
        try:
            ids = tokenizer.encode(document.text)
            text = tokenizers.encoded_text(tokenizer, document.text, ids)
        except Exception as error:  # the libraries raise many types
            beginning = f"{name}: {document.text[:40]!r} …"
            raise ValueError(f"{beginning} cannot be tokenized ({error!r})") from error
        ids = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.uint32)
        text_bytes = np.frombuffer(text.encode(), np.uint8)
        byte_counts += np.bincount(text_bytes, minlength=256)
        counts[document.label] += 1, len(text_bytes)
        label_id = list(counts).index(document.label)
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        # Neighbouring records share a token: the last target of one is the first input of the next.
        for start in range(0, len(ids) - 1, RECORD_TOKENS - 1):
            record = ids[start : start + RECORD_TOKENS]
            writer.write(record.tobytes())
            pairs.append(len(record) - 1)
            label_ids.append(label_id)
    writer.close()
    np.save(folder / "pairs.npy", np.array(pairs, np.int32))
    np.save(folder / "label_ids.npy", np.array(label_ids, np.int32))
    meta = {
        "labels": list(counts),
        "bytes_per_label": [int(num_bytes) for _, num_bytes in counts.values()],
        "documents_per_label": [int(number) for number, _ in counts.values()],
        "byte_counts": byte_counts.tolist(),
        "digest": digest.hexdigest(),
        "skipped": dict(skipped.by_reason),
    }
    corpus.seal(folder, meta)
    return len(pairs)
