"""Bounds on what a file from a stranger may make a reader take into memory, however well it is compressed.

A line or a quoted field that does not end, headers of an archive that go on for gigabytes, rows and arrays larger than the machine:
each importer that streams reads through one of these. `source` opens files; nothing is opened here.
"""

from __future__ import annotations

import io
from typing import IO

import psutil

from ntkdask.errors import DataError
from ntkdask.wording import format_bytes

BLOCK_BYTES = 2**26
"""Bytes of text that a block of lines may take; importers cut blocks after a MiB or 262144 cells."""

MAX_ROW_BYTES = 2**28
"""Bytes of one row, an image or a record, of an archive or a compressed file."""


class BoundedStream(io.RawIOBase):
    """The bytes of another stream, of which so many are given at most until `refill` is called; DataError for more.

    Parameters
    ----------
    stream : binary stream
        What is read; it is not closed here.
    message : str
        The text of the error.
    limit : int
        Bytes until `refill`.
    """

    def __init__(self, stream: IO[bytes], message: str, limit: int = BLOCK_BYTES) -> None:
        self._stream, self._message, self._limit = stream, message, limit
        self._left: float = limit

    def refill(self, unlimited: bool = False) -> None:
        """Allow the limit again, or any number of bytes."""
        self._left = float("inf") if unlimited else self._limit

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer at the end."""
        if not 0 <= size <= self._left:
            raise DataError(self._message)
        content = self._stream.read(size)
        self._left -= len(content)
        return content

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the limit allows; returns the number of bytes."""
        if self._left <= 0:
            raise DataError(self._message)
        content = self.read(int(min(len(buffer), self._left)))
        buffer[: len(content)] = content
        return len(content)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """Whether the stream is."""
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As the stream."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """As the stream."""
        return self._stream.tell()


def require_row(n_bytes: int) -> None:
    """DataError where a row takes more than `MAX_ROW_BYTES`."""
    if n_bytes > MAX_ROW_BYTES:
        limit = format_bytes(MAX_ROW_BYTES)
        raise DataError(
            f"a row of {format_bytes(n_bytes)} is claimed, the limit is {limit}. It is damaged; check the file."
        )


def require_memory(what: str, n_bytes: int, advice: str) -> None:
    """DataError where what is read whole takes over half of the free memory; `what` begins the message, `advice` ends it."""
    available = psutil.virtual_memory().available
    if 2 * n_bytes > available:
        raise DataError(
            f"{what} takes {format_bytes(n_bytes)} at once; {format_bytes(available)} of memory are free. {advice}"
        )
