"""Documents: the items that a source yields, each of which belongs to one split."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from moe_jax import untrusted
from moe_jax.data import chat, chat_pairs, policy
from moe_jax.data.policy import KEYS, Reading, UnusableError, check_length

TRAIN, VALIDATION, TEST = "train", "validation", "test"
LONGEST_LABEL = 200  # characters


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
    conversation: chat.Conversation | None = None  # `text` is then what its messages say
    labels: Mapping[str, str] | None = None  # further labels by kind, such as {"domain": "code"}
    # `text` is then its prompt and an answer, and so is the conversation, if there is one.
    preference: Preference | chat_pairs.Pair | None = None


def is_held_out(key: str, fraction: float) -> bool:
    """True if the document `key` is held out: a pseudo-random choice that never changes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def from_json(line: str, reading: Reading, label: str = "all") -> tuple[str, Document]:
    """`from_record` of a JSON object."""
    # A name that is written twice has two values, of which `json` would take the last.
    twice, what = line.count(f'"{reading.text_field}"') > 1, ""
    try:
        record = json.loads(line, object_pairs_hook=_without_duplicates if twice else None)
    except UnusableError:
        raise
    except json.JSONDecodeError as error:
        record, what = None, f" ({error.msg.removesuffix(' at')}, column {error.colno})"
    except ValueError:  # the only one of Python's own
        most = f"{sys.get_int_max_str_digits():,}"
        problem = f" has a whole number of more than {most} digits; write it as a string"
        raise UnusableError(problem, "a number that is too long") from None
    if not isinstance(record, dict):
        hint = "; it begins an array or an object of several lines: write one object per line, for "
        hint += "example with jq -c '.[]' or jq -c ."
        begins = line.startswith("[") or line.strip() == "{"
        what = hint if begins else what
        fields = chat.FORMS if reading.conversations else f'"{reading.text_field}"'
        problem = f" is not a JSON object with {fields}{what}"
        raise UnusableError(problem, "not a JSON object")
    return from_record(record, reading, label)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise UnusableError(" has two values for one name", "a name with two values")
    return record


def from_record(
    record: Mapping[str, Any], reading: Reading, label: str = "all"
) -> tuple[str, Document]:
    """The key and the document of a record; `label` is that of a record without one.

    A preference has no `text` but the strings `prompt`, `chosen` and `rejected`, or `prompt`,
    `completion` and a `label`, which is true for a good completion. The key, by which a document is
    held out, is `doc`, or else `id`, or else the text; for a preference the prompt, so that no
    prompt is in both splits.

    Raises: UnusableError for a text or a label that is no string, that UTF-8 cannot encode, or that
      is too long; its message continues the name of the record.
    """
    if reading.conversations:
        return _of_conversation(record, reading, label)
    name = reading.text_field
    preference = None if name in record else _preference(record)
    if preference:
        answer = preference.rejected if preference.chosen is None else preference.chosen
        record = {**record, name: preference.prompt + str(answer)}
    text = _value(record, name)
    if text is None and name not in record:
        names = untrusted.label(", ".join(_names(record, name)))
        fix = policy.fix_of_text(record)
        raise UnusableError(f' has no "{name}" (its fields: {names or "none"}); {fix}', "no text")
    if not isinstance(text, str):
        raise UnusableError(f': "{name}" is not a string', "a text that is no string")
    label = _label(record, reading) or label
    whole = preference.prompt if preference else text
    key = str(next((record[k] for k in KEYS if record.get(k) not in (None, "")), whole))
    try:
        f"{key}{label}{text}{record.get('rejected')}".encode()
    except UnicodeEncodeError:  # JSON escapes can express surrogates, which UTF-8 cannot encode
        raise UnusableError(" has half a surrogate pair", "half a surrogate pair") from None
    check_length(text, reading.max_line)
    return key, Document(text, label, preference=preference)


def _of_conversation(
    record: Mapping[str, Any], reading: Reading, label: str
) -> tuple[str, Document]:
    """The key is the first message after those of the system, so that no question is in both
    splits. A pair's conversation is that with the chosen answer."""
    try:
        given = chat_pairs.pair(record) if reading.pairs else None
        talks = given.both if given else (chat.conversation(record),)
        texts = ["\n".join(str(one.get("content") or "") for one in t.messages) for t in talks]
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UnusableError(" has half a surrogate pair", "half a surrogate pair") from None
    except ValueError as error:
        raise UnusableError(str(error), "no conversation") from None
    for text in texts:
        check_length(text, reading.max_line)
    first = str(next(one for one in talks[0].messages if one["role"] != "system").get("content"))
    key = str(next((record[k] for k in KEYS if record.get(k) not in (None, "")), first))
    label = _label(record, reading) or label
    return key, Document(texts[0], label, conversation=talks[0], preference=given)


def _names(record: Mapping[str, Any], field: str) -> list[str]:
    """The names of the fields that a record has, with those inside of the one that leads to
    `field`."""
    outer, _, _ = field.rpartition(".")
    inner = _value(record, outer) if outer else None
    return [*record, *(f"{outer}.{name}" for name in (inner if isinstance(inner, dict) else ()))]


def _label(record: Mapping[str, Any], reading: Reading) -> str:
    """The record's own label; "" for none, which is refused if a field was asked for."""
    for field in reading.labels:
        found = _value(record, field)
        if found is None and reading.label_field and not reading.label_pattern:
            raise UnusableError(f' has no "{field}", which is config.data.label_field', "no label")
        if found and not isinstance(found, str | int | float):
            raise UnusableError(
                f': "{field}" is not a string; set config.data.label_field to one that is',
                "a label that is no string",
            )
        if found and len(str(found)) > LONGEST_LABEL:
            raise UnusableError(
                f': "{field}" has {len(str(found)):,} characters, more than the {LONGEST_LABEL} of '
                "a label; set config.data.label_field to a shorter field",
                "a label that is too long",
            )
        if found:
            return str(found)
    return ""


def _value(record: Mapping[str, Any], field: str) -> Any:
    """The value of a field, whose name may lead into another one; None if there is none."""
    if field in record or "." not in field:
        return record.get(field)
    name, _, rest = field.partition(".")
    inner = record.get(name)
    return _value(inner, rest) if isinstance(inner, dict) else None


def _preference(record: Mapping[str, Any]) -> Preference | None:
    """The preference of a record; None for a record of another form."""
    if not policy.is_preference(record):
        return None
    is_pair = "chosen" in record or "rejected" in record
    names = ("chosen", "rejected") if is_pair else ("completion",)
    for name in ("prompt", *names):
        if not isinstance(record.get(name), str):
            raise UnusableError(
                f': "{name}" of a preference is not a string; for messages, set '
                "data.conversations=True",
                "a damaged pair",
            )
    if is_pair:
        return Preference(record["prompt"], record["chosen"], record["rejected"])
    if not isinstance(label := record["label"], bool):
        raise UnusableError(
            ': "label" of a completion is neither true nor false', "a damaged preference"
        )
    answers = (record["completion"], None) if label else (None, record["completion"])
    return Preference(record["prompt"], *answers)
