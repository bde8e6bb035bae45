"""Limits for the tokenizer of a stranger: its library panics, or takes any memory and time.

Nothing here changes how a usable tokenizer reads text: the limits are far beyond those of published
ones.
"""

import base64
import binascii
import contextlib
import functools
import math
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

MOST_IDS = 2**31 - 1  # ids are int32
# Text may become so many times longer by the steps before or after the model. Published ones stay
# below 40: one normaliser's table of Unicode, some of whose characters stand for whole words.
MOST_GROWTH = 1000
MOST_STEPS = 100
MOST_TEMPLATE = 100  # tokens that a template adds to a prompt, and ids of one of them
MOST_REPEATS = 1000  # of a regular expression, all its {m,n} multiplied
LONGEST_AFFIX = 100
MOST_SPLITS = 10**9  # characters compared to find which two pieces make another
PIPELINE = ("normalizer", "pre_tokenizer", "decoder")


def check_json(values: dict[str, Any]) -> None:
    """Refuses a tokenizer.json that would take too much memory or time. Raises: ValueError."""
    for part in PIPELINE:
        steps = list(_steps(values.get(part)))
        if len(steps) > MOST_STEPS:
            raise ValueError(f"its {part} has {len(steps)} steps, more than {MOST_STEPS}")
        growth = math.prod(map(_growth, steps))
        if growth > MOST_GROWTH:
            raise ValueError(f"its {part} makes text up to {growth:,} times longer")
        for step in steps:
            pattern = step.get("pattern")
            _check_pattern(pattern.get("Regex", "") if isinstance(pattern, dict) else "")
    for step in _steps(values.get("post_processor")):
        _check_template(step)
    model = values.get("model")
    model = model if isinstance(model, dict) else {}
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name))) > LONGEST_AFFIX:
            raise ValueError(f"its {name} is longer than {LONGEST_AFFIX} characters")
    pieces, added = model.get("vocab"), values.get("added_tokens")
    check_ids(pieces.values() if isinstance(pieces, dict) else ())
    check_ids(token.get("id", 0) for token in added or () if isinstance(token, dict))


def check_ids(ids) -> None:
    """Refuses ids that are not int32. Raises: ValueError."""
    for number in ids:
        if isinstance(number, int) and not 0 <= number < MOST_IDS:
            raise ValueError(f"it has the id {number}, not one from 0 to {MOST_IDS - 1}")


def check_pieces(names: list[str], charsmap: bytes) -> None:
    """Refuses a tokenizer.model that would take too much memory or time. Raises: ValueError."""
    if sum(len(name) ** 2 for name in names) > MOST_SPLITS:
        raise ValueError("its pieces are too long to find which of them make another")
    if charsmap and (growth := _growth_of_charsmap(charsmap)) > MOST_GROWTH:
        raise ValueError(f"its normalizer makes text up to {growth:,} times longer")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer.json, of which a Sequence has several."""
    if not isinstance(part, dict):
        return
    inner = [value for value in part.values() if isinstance(value, list)]
    if part.get("type") == "Sequence":
        for step in (step for steps in inner for step in steps):
            yield from _steps(step)
    else:
        yield part


def _growth(step: dict[str, Any]) -> int:
    """The factor by which a step can lengthen a text."""
    match step:
        case {"type": "Replace", "content": str() as content}:
            return max(1, len(content))
        case {"type": "Prepend", "prepend": str() as text}:
            return max(1, len(text))
        case {"type": "ByteLevel"}:
            return 2  # of a character that is two bytes, each becomes a character
        case {"type": "Precompiled", "precompiled_charsmap": str() as text}:
            try:
                return _growth_of_charsmap(base64.b64decode(text, validate=True))
            except binascii.Error as error:
                raise ValueError(f"its precompiled_charsmap is not base64: {error}") from None
    return 1


def _growth_of_charsmap(charsmap: bytes) -> int:
    """The bytes of the longest text in a table of SentencePiece: a size, a trie, and the texts."""
    size = struct.unpack("<I", charsmap[:4])[0] if len(charsmap) >= 4 else 0
    if not 0 < size <= len(charsmap) - 4 or size % 4:
        raise ValueError("its precompiled_charsmap is damaged")
    return max(map(len, charsmap[4 + size :].split(b"\0")))


def _check_pattern(pattern: Any) -> None:
    repeats = re.findall(r"(?<!\\[xpPu])\{\s*(\d+)?\s*,?\s*(\d+)?\s*\}", str(pattern))
    times = math.prod(max(int(number or 1) for number in pair) for pair in repeats)
    if times > MOST_REPEATS:
        raise ValueError(f"its pattern {str(pattern)[:60]!r} repeats a part {times:,} times")


def _check_template(step: dict[str, Any]) -> None:
    for name in ("single", "pair"):
        if isinstance(pieces := step.get(name), list) and len(pieces) > MOST_TEMPLATE:
            raise ValueError(f"its template adds {len(pieces)} pieces to a prompt")
    special = step.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        if isinstance(ids, list):
            check_ids(ids)
            if len(ids) > MOST_TEMPLATE:
                raise ValueError(f"its template adds {len(ids)} ids in one piece to a prompt")


@contextlib.contextmanager
def without_panics(before: str = "") -> Iterator[None]:
    """Turns a panic of the library's Rust code, which is no Exception, and its bare Exceptions into
    a ValueError whose message begins with `before`.

    A panic prints lines on file descriptor 2, which is kept back meanwhile; without a panic, what
    was printed follows at the end.
    """
    sys.stderr.flush()
    said = _kept_back()
    try:
        stderr = os.dup(2)
    except OSError:  # a process may have no stderr
        stderr = os.open(os.devnull, os.O_WRONLY)
    os.dup2(said.fileno(), 2)
    panic = None
    try:
        yield
    except BaseException as error:
        if type(error).__name__ not in ("PanicException", "Exception"):
            raise
        panic = " ".join(str(error).split())[:200]
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        if size := os.lseek(said.fileno(), 0, os.SEEK_CUR):
            if panic is None:
                os.write(2, os.pread(said.fileno(), size, 0))
            os.ftruncate(said.fileno(), 0)
            os.lseek(said.fileno(), 0, os.SEEK_SET)
    if panic is not None:
        raise ValueError(f"{before}its library fails: {panic}")


@functools.cache
def _kept_back() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)
