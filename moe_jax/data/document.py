"""Documents: the items that a source yields, each of which belongs to one split."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax import stopping

TRAIN, VALIDATION = "train", "validation"
LABELS, KEYS = ("language", "lang"), ("doc", "id")
FIELDS = ("text", *LABELS, *KEYS)  # the fields of a record that are read; all but text are optional


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its labels."""

    text: str
    label: str  # losses are reported by this label: a language, or "all"
    # A conversation, with each message as {"role", "content"}.
    messages: tuple[Mapping[str, str], ...] | None = None
    weights: tuple[float, ...] | None = None  # the loss weight of each message
    labels: Mapping[str, str] | None = None  # further labels by kind, such as {"domain": "code"}


def is_held_out(key: str, fraction: float) -> bool:
    """True if the document `key` is held out: a pseudo-random choice that never changes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def check_length(place: str, text: str | bytes, max_line: int) -> None:
    """Refuses a text of more than `max_line` characters, or bytes that must be one."""
    if len(text) > max_line * (4 if isinstance(text, bytes) else 1):
        raise ValueError(
            f"{place} is longer than the {max_line:,} characters of data.max_line; raise it, or "
            "make several records of it"
        )


def refusal(place: str, error: Exception) -> ValueError:
    """The line that refuses the record at `place`, which caused an error.

    A ValueError whose message begins with ":" or a space continues the name of the place.
    """
    stopping.pass_on(error)
    problem = str(error)
    if not (isinstance(error, ValueError) and problem.startswith((":", " "))):
        problem = f" cannot be read ({type(error).__name__}: {' '.join(problem.split())})"
    return ValueError(f"{place}{problem}; mend it")


def from_json(line: str) -> tuple[str, Document]:
    """`from_record` of a JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError(' is not a JSON object with "text"')
    return from_record(record)


def from_record(record: Mapping[str, Any]) -> tuple[str, Document]:
    """The key and the document of a record with the fields `FIELDS`.

    The key, by which a document is held out, is `doc`, or else `id`, or else the text.

    Raises: ValueError for a text that is no string or that UTF-8 cannot encode.
    """
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(': "text" is not a string')
    label = str(record.get("language") or record.get("lang") or "all")
    key = str(next((record[k] for k in KEYS if record.get(k) not in (None, "")), text))
    try:
        f"{key}{label}{text}".encode()
    except UnicodeEncodeError:  # JSON escapes can express surrogates, which UTF-8 cannot encode
        raise ValueError(" has half a surrogate pair") from None
    return key, Document(text, label)
