"""Generated texts in a file, one JSON object a line, and their words."""

import dataclasses
import functools
import pathlib
import stat
from collections.abc import Iterator

import tokenizers
from tokenizers import pre_tokenizers

from moe_jax import strict_json

FIELDS = ("text", "prompt", "source", "language", "label")
MAX_LINE = 4_000_000  # bytes; a longer line is no text that a model generated
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


def words(text: str) -> list[str]:
    """The words and marks of a text, as it spells them; spaces are dropped.

    Every character of Chinese, Japanese, Thai, Lao, Khmer and Burmese is a word, because these
    scripts put no space between words.
    """
    return [word for word, _ in _SPLIT.pre_tokenize_str(text)]


def read(path: pathlib.Path) -> list[Sample]:
    """The samples of a file of JSON lines; a line's label is its `label`, its `language`, or "all".

    Raises: ValueError, with file and line, for a line that is too long, is not UTF-8, is not a JSON
      object with a string "text", or has another type in a field of `FIELDS`; for no samples.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; give a .jsonl file of generated texts")
    samples = []
    for number, line in _lines(path):
        try:
            samples.append(_sample(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} {error}") from None
    if not samples:
        raise ValueError(f'{path} has no lines; each is {{"text": "…"}}, with a "prompt" if known')
    return samples


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 2), b""), start=1):
            if len(line.rstrip(b"\n")) > MAX_LINE:
                raise ValueError(
                    f"{path}:{number} is longer than {MAX_LINE:,} bytes; divide or remove it"
                )
            if line.strip():
                yield number, line


def _sample(line: bytes) -> Sample:
    try:
        record = strict_json.parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason}); convert it") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError('is not a JSON object with "text"')
    values = {name: record[name] for name in FIELDS if record.get(name) is not None}
    for name, value in {"text": record["text"], **values}.items():
        if not isinstance(value, str):
            raise ValueError(f'has "{name}" of type {type(value).__name__}; it must be a string')
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON escapes can express surrogates, which UTF-8 cannot encode
            raise ValueError(f'has half a surrogate pair in "{name}"') from None
    label = values.get("label") or values.get("language") or "all"
    return Sample(**{**values, "label": label})
