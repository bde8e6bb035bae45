"""Text files, which may be compressed, as UTF-8; other encodings and damage are named."""

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from typing import TextIO

from moe_jax.data import compressed, stored
from moe_jax.data.policy import UnusableError

OTHER_FORMAT = "a file of another format"  # the reason for which it is counted
BYTE_ORDER_MARK = "\ufeff"
# Byte order marks of encodings other than UTF-8. UTF-32 comes first: its mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Control characters, which are rare in UTF-8 text but are the high bytes of letters in UTF-16 and
# UTF-32: 0 for Latin, 3 for Greek, 4 for Cyrillic. Tabs and line ends are excluded.
CONTROL = bytes(set(range(32)) - set(b"\t\n\r"))
# Text without a byte order mark is recognised by which of every four bytes are mostly control
# characters ("0") and which mostly are not ("."). The keys are regular expressions.
REGULAR = {r"00.\.": "UTF-32BE", r"\..00": "UTF-32LE", r"0\.0\.": "UTF-16BE", r"\.0\.0": "UTF-16LE"}
SAMPLE_BYTES, MIN_SAMPLE_BYTES, BUFFER_BYTES = 4096, 16, 65_536


@contextlib.contextmanager
def opened(path: stored.Path) -> Iterator[TextIO]:
    """The text of a file, which may be compressed; `check` finds bytes that are not UTF-8.

    Raises: UnusableError for another encoding, and with the last good line for a file that cannot
      be read.
    """
    try:
        with compressed.open_file(path) as content:
            sample = content.read(SAMPLE_BYTES)
        if found := compressed.format_of(path, sample):
            of = "the content of " * (path.suffix in compressed.OPENERS)
            raise UnusableError(f"{of}{path} is {found}", OTHER_FORMAT)
        kind = _encoding(sample)
        if kind != "UTF-8":
            fix = f"convert it, for example with iconv -f {kind} -t UTF-8"
            message, lines = f"{path} is {kind}, not UTF-8; {fix}", _good_lines(path)
            raise UnusableError(message, "a file that is not UTF-8", lines)
        with compressed.open_file(path) as content:
            yield io.TextIOWrapper(content, encoding="utf-8", errors="surrogateescape")
    except compressed.ERRORS as error:
        number = _good_lines(path)
        if not number and (found := compressed.format_of(path)):
            raise UnusableError(f"{path} is {found}", OTHER_FORMAT) from error
        where = f" after line {number}" if number else ""
        message = f"{path} cannot be read{where} ({' '.join(str(error).split())}); replace it"
        raise UnusableError(message, "a damaged file", number) from error


def check(path: stored.Path, text: str, first_line: int) -> None:
    """Refuses a text in which `opened` has replaced bytes that are not UTF-8 by surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as error:
            line = first_line + error.object[: error.start].count(b"\n")
            # Files of the other formats end with a checksum, which is compared before.
            fix = "convert it" + ", or replace it if it is damaged" * (path.suffix == ".zst")
            message = f"{path} is not UTF-8 ({error.reason}, line {line}); {fix}"
            raise UnusableError(message, "not UTF-8") from None


def _encoding(sample: bytes) -> str:
    """The encoding of a file that begins with `sample`, as iconv spells it.

    It is UTF-8 unless a byte order mark or a regular pattern of control characters proves another
    one; a NUL alone does not, because UTF-8 may contain it.
    """
    for mark, kind in MARKS.items():
        if sample.startswith(mark):
            return kind
    if len(sample) < MIN_SAMPLE_BYTES:
        return "UTF-8"
    columns = [sample[i::4] for i in range(4)]
    shares = [1 - len(column.translate(None, CONTROL)) / len(column) for column in columns]
    found = "".join("0" if share > 0.5 else "." if share < 0.25 else "?" for share in shares)
    return next((kind for form, kind in REGULAR.items() if re.fullmatch(form, found)), "UTF-8")


def _good_lines(path: stored.Path) -> int:
    """The number of lines that can be read of a damaged file."""
    number = 0
    with contextlib.suppress(Exception), compressed.open_file(path) as content:
        while chunk := content.read1(BUFFER_BYTES):  # all that can be read of a damaged archive
            number += chunk.count(b"\n")
    return number
