"""What a source yields: documents, each in one split."""

import dataclasses
import hashlib
from collections.abc import Mapping

TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and what is known of it."""

    text: str
    label: str  # losses are reported under it: a language, or "all"
    messages: tuple[Mapping[str, str], ...] | None = (
        None  # a conversation, each {"role", "content"}
    )
    weights: tuple[float, ...] | None = None  # the loss weight of each message
    labels: Mapping[str, str] | None = None  # further labels by kind, such as {"domain": "code"}


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document `key` is in the held-out split: a fixed pseudo-random choice."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64
