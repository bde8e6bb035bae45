"""Compressed files as streams of bytes, in bounded memory; damage and truncation are errors."""

import gzip
import io
import lzma
import pathlib
import zlib
from collections.abc import Callable

ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)  # raised by the streams of `open_file`
BUFFER_BYTES = 65_536
# Files of `xz -9` need 65 MB; a file can declare a dictionary of up to 4 GB.
XZ_MEMORY = 512 << 20


class _Xz(io.RawIOBase):
    """The concatenated streams of an .xz file.

    lzma.LZMAFile ends without an error where a later stream is damaged or where padding separates
    two streams, and the rest of the text is lost.
    """

    def __init__(self, path: pathlib.Path):
        self._file = open(path, "rb")
        self._stream: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while True:
            if self._stream is None or self._stream.eof:
                content = self._stream.unused_data.lstrip(b"\0") if self._stream else b""
                while not content:
                    if not (chunk := self._file.read(BUFFER_BYTES)):
                        return 0
                    content = chunk.lstrip(b"\0")  # streams may be padded
                self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            else:
                content = self._file.read(BUFFER_BYTES) if self._stream.needs_input else b""
                if self._stream.needs_input and not content:
                    raise EOFError("the last stream has no end")
            if found := self._stream.decompress(content, len(buffer)):
                buffer[: len(found)] = found
                return len(found)


def _zstandard(path: pathlib.Path):
    import pyarrow  # this takes a quarter of a second, and other files do not need it

    # pyarrow reads concatenated and skippable frames, checks their checksums, refuses a truncated
    # frame and a window of more than 128 MB.
    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable] = {
    ".gz": lambda path: gzip.open(path, "rb"),
    ".xz": lambda path: io.BufferedReader(_Xz(path), BUFFER_BYTES),
    ".zst": lambda path: io.BufferedReader(_zstandard(path), BUFFER_BYTES),
}


def open_file(path: pathlib.Path) -> io.BufferedReader | gzip.GzipFile:
    """The bytes of a file, decompressed if its name ends as one of `OPENERS`; it cannot seek.

    Raises: one of `ERRORS`, also while it is read.
    """
    if path.suffix not in OPENERS:
        return open(path, "rb")
    if not path.stat().st_size:  # gzip and Zstandard would read it as a text without characters
        raise EOFError("it is empty, and even compressed nothing has some bytes")
    return OPENERS[path.suffix](path)
