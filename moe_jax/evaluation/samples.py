"""Generated texts in a file, one JSON object a line, and their words."""

import dataclasses
import functools
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from moe_jax.evaluation import json_lines

# A character of a script that has no spaces between words is a word of its own.
_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_ALONE}]|[\w&&[^{_ALONE}]]+|[^\w\s]"
_SPLIT = pre_tokenizers.Split(tokenizers.Regex(_WORD), "removed", invert=True)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generated text.

    prompt: the text that the model continued.
    source: the text that this one should render, such as the text to translate or to summarise.
    language: the code of the language that the text should have, such as "ja" or "pt-br".
    label: results are reported by this label.
    """

    text: str
    prompt: str | None = None
    source: str | None = None
    language: str | None = None
    label: str = "all"

    @functools.cached_property
    def words(self) -> list[str]:
        return words(self.text)


FIELDS = [field.name for field in dataclasses.fields(Sample)]


def words(text: str) -> list[str]:
    """The words and marks of a text, as it spells them; spaces are dropped.

    Every character of Chinese, Japanese, Thai, Lao, Khmer and Burmese is a word, because these
    scripts put no space between words.
    """
    return [word for word, _ in _SPLIT.pre_tokenize_str(text)]


def parse(values: dict[str, Any]) -> Sample:
    """The sample of a line: {"text"}, perhaps with other fields of `Sample`, which may be null. Its
    label is its `label`, its `language`, or "all". Raises: ValueError for fields that are no texts.
    """
    values = {"text": values.get("text")} | {n: v for n, v in values.items() if v is not None}
    own = {field: json_lines.text(values, field) for field in FIELDS if field in values}
    return Sample(**{**own, "label": own.get("label") or own.get("language") or "all"})
