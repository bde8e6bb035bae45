"""Documents: the items that a source yields, each of which belongs to one split."""

import dataclasses
import hashlib
from collections.abc import Mapping

TRAIN, VALIDATION = "train", "validation"


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
