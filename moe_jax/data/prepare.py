"""Corpora of token records: opened from the cache or a prepared folder, and made if need be."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_jax import files, strict_json
from moe_jax.data import (
    chat,
    corpus,
    duplicates,
    encoding,
    preparation,
    shards,
    sources,
    text_files,
)
from moe_jax.data.cache import DATASETS, writing
from moe_jax.data.corpus import DamagedError, TokenizedCorpus
from moe_jax.data.document import TEST, TRAIN, VALIDATION
from moe_jax.data.policy import STRICT, Reading, Skipped
from moe_jax.data.preparation import Job, Text
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.parallel import distributed

PLAN, SEEN = "plan.json", "seen.sqlite"
SPLITS = (VALIDATION, TRAIN)  # in the order in which they are made


def open_corpus(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache: pathlib.Path,
    reading: Reading = STRICT,
    form: chat.Form | None = None,
) -> TokenizedCorpus:
    """The tokenized documents of a split: a prepared corpus, or one in the folder `cache`.

    The cache stores them under a hash of text, tokenizer and options. `form` says how conversations
    become tokens; the run prints how many did not fit into a row.

    Raises: ValueError if the split is empty or the source cannot be used.
    """
    datasets = cache / DATASETS
    if (opened := sources.load(source, split, tokenizer.fingerprint)) is not None:
        return opened
    made_of = {
        "source": sources.fingerprint(source, datasets),
        "split": split,
        "validation_fraction": validation_fraction,
        "tokenizer": tokenizer.fingerprint,
        "reading": reading.key,
        **({"form": form.key} if form else {}),
    }
    key = [corpus.VERSION, *made_of.values()]
    folder = cache / "tokens" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if folder.exists():
        try:
            return _with_loss(TokenizedCorpus.load(folder), source, split, form)
        except DamagedError as error:
            distributed.say(f"{str(error).partition('; ')[0]}; it is made anew")
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
        name = f"{source} {split}"
        job = Job(tokenizer, skip_damaged=reading.skip_damaged, form=form)
        with preparation.pool_of(job) as pool:
            facts = preparation.prepare(
                *(unfinished, [documents], pool), name=name, made_of=made_of, skipped=skipped
            )
        for reason, number in facts.dropped.items():
            distributed.say(f"{name}: left out, {reason}: {number:,}")
        if not facts.documents:
            raise ValueError(_nothing_left(source, split, facts, skipped, form))
        if not (unfinished / corpus.MANIFEST).exists():  # no document has a token
            raise ValueError(
                f"data.source={source!r}: no {split} conversation has any text, as "
                f"{_writing(form)} writes it; check the template"
            )
        if sources.fingerprint(source, datasets) != made_of["source"]:
            raise ValueError(f"data.source={source!r} changed while it was read; run again")
    return _with_loss(TokenizedCorpus.load(folder), source, split, form)


def _with_loss(
    found: TokenizedCorpus, source: str, split: str, form: chat.Form | None
) -> TokenizedCorpus:
    """The corpus. Raises: ValueError if none of its tokens has a loss."""
    if not found.num_tokens:
        raise ValueError(
            f"data.source={source!r}: no token of its {split} conversations has a loss, for all "
            f"answers are empty, as {_writing(form)} writes them; give answers with text, or check "
            "the template"
        )
    return found


def _writing(form: chat.Form | None) -> str:
    """The template of conversations, in words."""
    return f"the chat template of {form.template.place}" if form else "the tokenizer"


def _nothing_left(
    source: str, split: str, facts: shards.Facts, skipped: Skipped, form: chat.Form | None
) -> str:
    """The line that refuses a split without documents: why there are none, and the fix."""
    causes, fixes = [], []
    if form and (too_long := facts.dropped[encoding.TOO_LONG]):
        row = f"a row of {form.most - 1:,} tokens"
        causes.append(f"conversations do not fit into {row}: {too_long:,}")
        fixes.append("raise config.data.sequence_length")
    if skipped.in_words:
        causes.append(skipped.in_words)
    if facts.bad:
        such = " ".join(facts.bad[0])
        causes.append(f"documents could not be tokenized: {len(facts.bad):,}, such as {such}")
    if skipped.in_words or facts.bad:
        fixes.append("mend them")
    if split == TEST:
        fixes.append("add files whose names say test, or set config.evaluation.test_split=False")
    elif not facts.bad and not facts.dropped:
        fixes.append(
            "set config.data.validation_fraction to another value, or give more text: each record "
            f"and {text_files.PART_CHARACTERS:,} characters of .txt are one document; join a small "
            "source of a mixture with another one by a glob"
        )
    why = "".join(f", and {cause}" for cause in causes)
    return f"data.source={source!r} has no {split} documents{why}; {', or '.join(fixes)}"


def of_digest(digest: str, cache: pathlib.Path) -> TokenizedCorpus | None:
    """The corpus of the folder `cache` with this digest; None if there is none."""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return None
    for path in sorted((cache / "tokens").glob(f"*/{corpus.MANIFEST}")):
        with contextlib.suppress(DamagedError, OSError, UnicodeDecodeError):
            if digest in path.read_text(encoding="utf-8"):
                found = TokenizedCorpus.load(path.parent)
                if found.digest == digest:
                    return found
    return None


def prepare_folder(
    text: Text,
    output: pathlib.Path,
    job: Job,
    *,
    workers: int = 1,
    write_shards: Callable[[Text, pathlib.Path, Job, Sequence[str]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes a prepared corpus for each split; goes on with what a killed process left.

    `write_shards(text, output, job, splits)` writes all shards; by default, `workers` processes do.
    A document of the training split that equals a held-out one is a duplicate, for a filter that
    compares documents.

    Returns: the manifests' facts by split, without a split that has no documents.
    Raises: ValueError if the folder has something else, or if no text is left to train on.
    """
    sources.check(text.source)
    made_of = {
        "source": sources.fingerprint(text.source, text.cache / DATASETS),
        "validation_fraction": text.validation_fraction,
        "tokenizer": job.tokenizer.fingerprint,
        "filters": list(job.specs),
        "shard_bytes": job.shard_bytes,
        "reading": text.reading.key,
    }
    with contextlib.ExitStack() as held:
        plan = {
            "version": corpus.VERSION,
            "source": made_of["source"],
            "validation_fraction": text.validation_fraction,
            "tokenizer": job.tokenizer.fingerprint,
            "filter": list(job.specs),
            "shard_mb": job.shard_bytes / 2**20,
            **text.reading.of_preparation,
        }
        held.enter_context(_claimed(output, plan))
        pool = held.enter_context(preparation.pool_of(job, workers))
        _remake(output, job)
        seen = None
        if write_shards:
            write_shards(text, output, job, SPLITS)
        elif job.chosen.compares:
            seen = held.enter_context(contextlib.closing(duplicates.Seen(output / SEEN)))
        for rank, split in enumerate(SPLITS):
            folder = output / split
            if (folder / corpus.MANIFEST).exists():
                shards.remove_facts(folder)
                continue
            skipped = Skipped(text.reading.skip_damaged)
            parts = (text.part(split, number, skipped) for number in range(len(text.parts)))
            facts = preparation.prepare(
                *(folder, () if write_shards else parts, pool),
                name=f"{text.source} {split}",
                made_of={**made_of, "split": split},
                skipped=skipped,
                seen=seen,
                rank=rank,
            )
            if not facts.documents:
                _refuse_or_remove(text, folder, split, facts, skipped)
        if seen:
            seen.remove()
        if sources.fingerprint(text.source, text.cache / DATASETS) != made_of["source"]:
            raise ValueError(f"--source={text.source} changed while it was read; begin anew")
    found = [split for split in SPLITS if (output / split).exists()]
    return {split: corpus.read_manifest(output / split) for split in found}


def _remake(output: pathlib.Path, job: Job) -> None:
    """Lets a split be made again of whose finished files one is missing: with all others if a
    filter compares documents."""
    lacking = []
    for split in SPLITS:
        folder = output / split
        if (folder / corpus.MANIFEST).exists():
            names = [shard[0] for shard in corpus.read_manifest(folder)["shards"]]
            if not all((folder / name).exists() for name in (*corpus.ARRAYS, *names)):
                lacking.append(split)
    for split in SPLITS if lacking and job.chosen.compares else lacking:
        (output / split / corpus.MANIFEST).unlink(missing_ok=True)


def _refuse_or_remove(
    text: Text, folder: pathlib.Path, split: str, facts: shards.Facts, skipped: Skipped
) -> None:
    if split == TRAIN:
        reasons = ", ".join(f"{number:,} by {name}" for name, number in facts.dropped.items())
        raise ValueError(
            f"--source={text.source}: no documents are left to train on (dropped: "
            f"{'; '.join(filter(None, (reasons or 'none', skipped.in_words)))}); give more text or "
            "other filters"
        )
    files.remove_folder(folder)


@contextlib.contextmanager
def _claimed(output: pathlib.Path, plan: dict[str, Any]) -> Iterator[None]:
    """Locks the folder against another process, and notes what it is to hold: by option, so that
    a different value can be named. As long as no shard is finished, other options may follow."""
    if output.exists() and not (output.is_dir() and (output / PLAN).exists()):
        if not output.is_dir() or any(output.iterdir()):
            raise ValueError(f"--output={output} has something else; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    folders = [output / split for split in SPLITS]
    lock = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output={output}: another process is preparing it") from None
        except OSError:  # a file system without locks
            pass
        there = strict_json.read_object(output / PLAN) if (output / PLAN).exists() else {}
        if differing := [name for name in plan if there.get(name) != plan[name]]:
            if any(output.glob(f"*/{corpus.MANIFEST}")) or any(map(shards.finished, folders)):
                names = (
                    differing if there.keys() == plan.keys() and "version" not in differing else ()
                )
                options = " and ".join(f"--{name}" for name in names)
                raise ValueError(
                    f"--output={output} was begun with "
                    f"{f'a different value of {options}' if options else 'another version'}; "
                    "use the same, choose another folder or remove it"
                )
            for left in (folder for folder in folders if folder.exists()):
                files.remove_folder(left)
            for left in output.glob(f"{SEEN}*"):
                left.unlink()
            files.write_text(output / PLAN, strict_json.text(plan, indent=1) + "\n")
        yield
    finally:
        os.close(lock)


def verify(output: pathlib.Path) -> Iterator[int]:
    """Hashes all files of a prepared folder; yields the bytes of each.

    Raises: DamagedError, with the name of a file that has changed.
    """
    if not (output / TRAIN).is_dir():
        raise ValueError(f"{output} is no folder of prepare_data: it has no folder {TRAIN}")
    for split in SPLITS:
        if split == TRAIN or (output / split).exists():
            yield from TokenizedCorpus.load(output / split).verify()
