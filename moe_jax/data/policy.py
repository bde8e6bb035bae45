"""How records are read: their fields, and the records that cannot be used and may be skipped."""

import collections
import dataclasses
from collections.abc import Container
from typing import Any

from moe_jax import stopping
from moe_jax.parallel import distributed

LABELS, KEYS = ("language", "lang"), ("doc", "id")
PREFERENCE = ("prompt", "chosen", "rejected", "completion", "label")  # its fields
LABELLED = ("prompt", "completion", "label")  # those of a preference with one answer
CONVERSATION = ("messages", "conversations", "tools", *PREFERENCE)  # its fields
MOST_NAMED = 20  # skipped records that are named in the output; the others are counted


@dataclasses.dataclass(frozen=True)
class Reading:
    """The fields of a record that are read, and what happens to records that cannot be used.

    A field in another one is written with a dot: `meta.language`.
    """

    max_line: int = 30_000_000  # most characters of a line of .jsonl, or of a record's text
    text_field: str = "text"
    label_field: str = ""  # empty: `LABELS`
    # A regular expression. Its first group in a file's name is the label of its records that have
    # none of their own.
    label_pattern: str = ""
    skip_damaged: int = 0  # the most records that may be skipped; the first is refused by default
    conversations: bool = False  # records are conversations (`chat.conversation`), not text
    pairs: bool = False  # with `conversations`: they are preferences (`chat_pairs.pair`)

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label_field,) if self.label_field else LABELS

    @property
    def columns(self) -> frozenset[str]:
        """The names that a table's columns may have to be read."""
        texts = CONVERSATION if self.conversations else (self.text_field,)
        fields = (*texts, *self.labels, *KEYS)
        return frozenset({*fields, *(field.split(".")[0] for field in fields)})

    @property
    def of_preparation(self) -> dict[str, Any]:
        """The values that decide which documents a source has, by option of `prepare_data`. Any
        number of records may be skipped, but none is another matter: the text before damage is
        then read."""
        return {**dataclasses.asdict(self), "skip_damaged": self.skip_damaged > 0}

    @property
    def key(self) -> list:
        """All that decides which documents a source has, for the key of a cache."""
        found = [self.text_field, self.label_field, self.label_pattern, self.skip_damaged]
        found.append(self.max_line if self.skip_damaged else None)
        found += ["conversations by question"] * self.conversations
        return [*found, "pairs"] if self.pairs and self.conversations else found


def is_preference(fields: Container[str]) -> bool:
    """True if a record with these fields is a preference: two answers, or one with a label."""
    return "chosen" in fields or "rejected" in fields or all(name in fields for name in LABELLED)


def fix_of_text(fields: Container[str]) -> str:
    """The advice for records with these fields, none of which is the text."""
    talks = "messages" in fields or "conversations" in fields
    if talks or ("prompt" in fields and "completion" in fields):
        return "set config.data.conversations=True"
    return "set config.data.text_field to the one with the text"


STRICT = Reading()  # refuses the first record that cannot be used


def of_config(data: Any, *, pairs: bool = False) -> Reading:
    """The part of a run's `config.data` that says how records are read; `pairs` if it trains on
    preferences."""
    return Reading(**{name: getattr(data, name) for name in keys(STRICT)}, pairs=pairs)


def keys(reading: Reading) -> dict[str, Any]:
    """The keys of `config.data` that give this reading."""
    return {name: value for name, value in vars(reading).items() if name != "pairs"}


class UnusableError(ValueError):
    """A record, or the rest of a file, that cannot be used; the message names it.

    `reason` is a phrase for counts, and `records` the number that is lost: at least that many, if
    it is a file whose number of records cannot be known.
    """

    def __init__(self, message: str, reason: str, records: int = 1):
        super().__init__(message)
        self.reason, self.records = reason, max(1, records)


_said = set[str]()  # a few messages of each source


class Skipped:
    """Counts the records of a source that are skipped, by reason, up to the most that may be.

    `errors` are the messages and the reasons.
    """

    def __init__(self, most: int):
        self._most, self._named = most, 0
        self.by_reason = collections.Counter[str]()
        self.errors: list[tuple[str, str]] = []

    def add(self, error: UnusableError) -> None:
        """Counts a record, and names it in the output unless this process has already done so, for
        a run reads a file once for each split; raises ValueError if it is one too many."""
        total = self.by_reason.total() + error.records
        if total > self._most:
            more = f" ({total:,} records cannot be used, and config.data.skip_damaged={self._most})"
            place = "" if str(error).startswith("data.source") else "data.source: "
            raise ValueError(f"{place}{error}{more if self._most else ''}") from error
        self.by_reason[error.reason] += error.records
        self.errors.append((str(error), error.reason))
        self._named += 1
        if self._named > MOST_NAMED + 1 or str(error) in _said:
            return
        _said.add(str(error))
        if self._named <= MOST_NAMED:
            distributed.say(f"skipped {total:,} of at most {self._most:,}: {error}")
        else:
            distributed.say("further records that are skipped are counted, but not named")

    @property
    def in_words(self) -> str:
        """The counts by reason; "" if there are none."""
        counts = ", ".join(f"{reason}: {number:,}" for reason, number in self.by_reason.items())
        return f"{self.by_reason.total():,} records were skipped ({counts})" if counts else ""


def check_length(text: str | bytes, max_line: int) -> None:
    """Refuses a text of more than `max_line` characters, or bytes that must be one."""
    if len(text) > max_line * (4 if isinstance(text, bytes) else 1):
        raise UnusableError(
            f" is longer than the {max_line:,} characters of data.max_line; raise it, or make "
            "several records of it",
            "too long",
        )


def refusal(place: str, error: Exception) -> UnusableError:
    """The error with the line that refuses the record at `place`, which caused `error`.

    The message of an UnusableError continues the name of the place if it begins with a space or a
    colon, and names the place itself otherwise.
    """
    stopping.pass_on(error)
    if isinstance(error, UnusableError):
        if not str(error).startswith((" ", ":")):
            return error
        fix = "" if ";" in str(error) else "; mend it"
        return UnusableError(f"{place}{error}{fix}", error.reason, error.records)
    name, words = type(error).__name__, " ".join(str(error).split())
    return UnusableError(f"{place} cannot be read ({name}: {words}); mend it", name)
