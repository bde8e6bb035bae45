"""TFDS datasets as a source: the package's own, and those that the user has prepared."""

import contextlib
import dataclasses
import functools
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_jax import files, stopping
from moe_jax.data import chat, document, policy, stored
from moe_jax.data.cache import writing
from moe_jax.data.document import TEST, VALIDATION, Document
from moe_jax.data.policy import Reading, Skipped, UnusableError

PREFIX = "tfds:"
EMBEDDED = "lo_parallel19"
INSTRUCTIONS = "instructions"  # the embedded text as conversations


def check(spec: str) -> None:
    if spec == PREFIX:
        raise ValueError("data.source='tfds:' names no dataset; use tfds:NAME")


def describe(spec: str, data_dir: pathlib.Path) -> str:
    info = _builder(spec, data_dir).info
    splits = (f"{split.name}: {split.num_examples:,}" for split in info.splits.values())
    return f"data.source={spec!r}: documents of {info.full_name} ({'; '.join(splits)})"


def fingerprint(spec: str, data_dir: pathlib.Path) -> str:
    """A hash of the names and contents of the dataset's files."""
    builder = _builder(spec, data_dir)
    folder = pathlib.Path(builder.data_dir)
    files_ = sorted(path for path in folder.iterdir() if path.is_file())
    return f"{builder.info.full_name}:{[(p.name, stored.digest(p, data_dir)) for p in files_]}"


def documents(
    spec: str,
    split: str,
    *,
    validation_fraction: float,
    data_dir: pathlib.Path,
    reading: Reading,
    skipped: Skipped,
) -> Iterator[Document]:
    """The documents of the dataset's own split of this name."""
    del validation_fraction
    builder = _builder(spec, data_dir)
    if split == VALIDATION and list(builder.info.splits) == [TEST]:
        split = TEST  # a probe that nobody trains on
    if split not in builder.info.splits:
        raise ValueError(
            f"data.source={spec!r} has no split {split!r}, only {list(builder.info.splits)}"
        )
    records = builder.as_data_source(split)
    for number in range(len(records)):
        try:
            record = _read(records, number)
            found = {name: _plain(value) for name, value in record.items()}
            text = document.from_record(found, reading)[1]
        except Exception as error:  # a value can be of any type
            skipped.add(policy.refusal(f"data.source={spec!r}: record {number} of {split}", error))
            continue
        yield text


def _read(records: Sequence[Mapping[str, Any]], number: int) -> Mapping[str, Any]:
    try:
        return records[number]
    except Exception as error:  # the reader has no exception class for damaged files
        stopping.pass_on(error)
        reason = " ".join(str(error).split())
        message = f" cannot be read ({reason}); replace the dataset's files or prepare it again"
        raise UnusableError(message, "a damaged record") from error


def instructions(spec: str, split: str, *, reading: Reading, **how: Any) -> Iterator[Document]:
    """The embedded text as conversations: a page's title is asked, and its body answers.

    Raises: ValueError unless `reading` is of conversations.
    """
    if not reading.conversations:
        raise ValueError(f"data.source={spec!r} are conversations; set data.conversations=True")
    pages = documents(
        "embedded", split, reading=dataclasses.replace(reading, conversations=False), **how
    )
    for page in pages:
        title, _, body = page.text.partition("\n")
        if body:
            turns = ("user", title), ("assistant", body)
            messages = tuple({"role": role, "content": content} for role, content in turns)
            yield dataclasses.replace(page, conversation=chat.Conversation(messages))


def _plain(value):
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UnusableError(f" is not UTF-8 ({error.reason}); mend it", "not UTF-8") from None


def _builder(spec: str, data_dir: pathlib.Path):
    # TFDS takes most of a second to import, and sources that are plain files do not need it.
    import tensorflow_datasets as tfds

    from moe_jax.data import corpora

    own = spec in ("embedded", INSTRUCTIONS)
    name = EMBEDDED if own else spec.removeprefix(PREFIX)
    if name in corpora.BUILDERS:
        make = functools.partial(corpora.BUILDERS[name], file_format="array_record")
        if not pathlib.Path((builder := make(data_dir=data_dir)).data_dir).exists():
            tfds.disable_progress_bar()  # preparing takes only two seconds
            # Locked, because TFDS removes what another process is preparing at the same time.
            with writing(data_dir), files.alone(data_dir / f".{name}.lock"):
                builder = make(data_dir=data_dir)
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare()
        return builder
    # The last two are raised for an invalid name, and for a version that does not exist.
    absent = (tfds.core.DatasetNotFoundError, ModuleNotFoundError, ValueError, AssertionError)
    for folder in (data_dir, None):  # None is TFDS's own folder, $TFDS_DATA_DIR
        with contextlib.suppress(*absent):
            builder = tfds.builder(name, data_dir=folder)
            if builder.info.splits:  # those of a dataset that is known but not prepared are empty
                break
    else:
        raise ValueError(
            f"data.source={spec!r} is not a dataset prepared under {data_dir} or $TFDS_DATA_DIR; "
            f"embedded ones are {', '.join(corpora.BUILDERS)}"
        )
    if (form := builder.info.file_format.value) != "array_record":
        raise ValueError(
            f"data.source={spec!r} is prepared as {form}, which has no random access; prepare it "
            "with file_format='array_record'"
        )
    return builder
