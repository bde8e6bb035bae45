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
class Preference:
    """A prompt with a preferred and a rejected answer; None for the one that nobody wrote."""

    prompt: str
    chosen: str | None
    rejected: str | None


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its labels."""

    text: str
    label: str  # losses are reported by this label: a language, or "all"
    # A conversation, with each message as {"role", "content"}.
    messages: tuple[Mapping[str, str], ...] | None = None
    weights: tuple[float, ...] | None = None  # the loss weight of each message
    labels: Mapping[str, str] | None = None  # further labels by kind, such as {"domain": "code"}
    preference: Preference | None = None  # `text` is then its prompt and an answer


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
    if not isinstance(record, dict) or not ({"text", "prompt"} & record.keys()):
        raise ValueError(' is not a JSON object with "text", or with "prompt" and answers')
    return from_record(record)


def from_record(record: Mapping[str, Any]) -> tuple[str, Document]:
    """The key and the document of a record with the fields `FIELDS`, or of a preference.

    A preference has no `text` but the strings `prompt`, `chosen` and `rejected`, or `prompt`,
    `completion` and a `label`, which is true for a good completion. The key, by which a document is
    held out, is `doc`, or else `id`, or else the text; for a preference the prompt, so that no
    prompt is in both splits.

    Raises: ValueError for a text that is no string or that UTF-8 cannot encode.
    """
    preference = None if "text" in record else _preference(record)
    if preference:
        answer = preference.rejected if preference.chosen is None else preference.chosen
        record = {**record, "text": preference.prompt + str(answer)}
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(': "text" is not a string')
    label = str(record.get("language") or record.get("lang") or "all")
    whole = preference.prompt if preference else text
    key = str(next((record[k] for k in KEYS if record.get(k) not in (None, "")), whole))
    try:
        f"{key}{label}{text}{record.get('rejected')}".encode()
    except UnicodeEncodeError:  # JSON escapes can express surrogates, which UTF-8 cannot encode
        raise ValueError(" has half a surrogate pair") from None
    return key, Document(text, label, preference=preference)


def _preference(record: Mapping[str, Any]) -> Preference:
    names = ("chosen", "rejected") if "chosen" in record else ("completion",)
    for name in ("prompt", *names):
        if not isinstance(record.get(name), str):
            raise ValueError(f': "{name}" of a preference is not a string')
    if len(names) == 2:
        return Preference(record["prompt"], record["chosen"], record["rejected"])
    if not isinstance(label := record.get("label"), bool):
        raise ValueError(': "label" of a completion is neither true nor false')
    answers = (record["completion"], None) if label else (None, record["completion"])
    return Preference(record["prompt"], *answers)
