"""Folders that `prepare_data` wrote, as a source: prepared:PATH has a corpus for each split."""

import pathlib
from typing import NoReturn

from moe_jax.data import corpus
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.data.document import TRAIN, VALIDATION

PREFIX = "prepared:"


def folder_of(spec: str) -> pathlib.Path:
    return pathlib.Path(spec.removeprefix(PREFIX))


def check(spec: str) -> None:
    """Raises ValueError unless the folder has a finished corpus to train on."""
    folder = folder_of(spec)
    if not (folder / TRAIN / corpus.MANIFEST).is_file():
        raise ValueError(
            f"data.source={spec!r}: {folder} is no folder that prepare_data has finished; run "
            f"prepare_data with --output={folder} first"
        )


def fingerprint(spec: str) -> str:
    """The digests of the tokens, from the manifests: the records are not read."""
    folder = folder_of(spec)
    found = (s for s in (TRAIN, VALIDATION) if (folder / s / corpus.MANIFEST).exists())
    return str([(split, corpus.read_manifest(folder / split)["digest"]) for split in found])


def describe(spec: str) -> str:
    folder, parts = folder_of(spec), []
    for split in (TRAIN, VALIDATION):
        if (folder / split / corpus.MANIFEST).exists():
            facts = corpus.read_manifest(folder / split)
            documents, tokens = (sum(facts[f"{name}_per_label"]) for name in ("documents", "pairs"))
            parts.append(
                f"{split}: {documents:,} documents, {tokens:,} tokens in {corpus.in_shards(facts)}"
            )
    return f"data.source={spec!r}: {'; '.join(parts)}"


def documents(spec: str) -> NoReturn:
    raise ValueError(f"data.source={spec!r} has tokens, no text; give the source it was made of")


def load(spec: str, split: str, tokenizer: str) -> TokenizedCorpus:
    """The corpus of a split.

    Raises: ValueError if there is none, or if it is not of the tokenizer with this fingerprint;
      DamagedError if its files have changed.
    """
    check(spec)
    if not (folder_of(spec) / split / corpus.MANIFEST).exists():
        raise ValueError(
            f"data.source={spec!r} has no {split} documents; prepare it with another "
            "--validation_fraction"
        )
    found = TokenizedCorpus.load(folder_of(spec) / split)
    if found.tokenizer != tokenizer:
        raise ValueError(
            f"data.source={spec!r} was prepared with the tokenizer {found.tokenizer[:12]}, not "
            f"{tokenizer[:12]}, as config.data.tokenizer is; set that to the one given to "
            "prepare_data"
        )
    return found
