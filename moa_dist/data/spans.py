"""Names files to read, or parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

_BLOCK_BYTES = 1 << 20


class Span(NamedTuple):
    """Names a file, or the documents of it that start in a range of bytes."""

    path: Path
    """The file."""
    start: int = 0
    """Offset of the first document."""
    end: int | None = None
    """Offset after the last document; None for the end of the file."""
    first_line: int = 1
    """Number of the first line, for messages; counted only when there is something to report."""

    @property
    def size(self) -> int:
        """Return the number of bytes on disk."""
        return (self.path.stat().st_size if self.end is None else self.end) - self.start

    def with_first_line(self) -> Span:
        """Return the same span with the right number of its first line."""
        newlines, left = 0, self.start
        with self.path.open("rb") as raw:
            while left > 0 and (block := raw.read(min(left, _BLOCK_BYTES))):
                newlines += block.count(b"\n")
                left -= len(block)
        return self._replace(first_line=newlines + 1)


class Bounded:
    """Reads the lines of a stream up to an offset, as if it ended there."""

    def __init__(self, raw: BinaryIO, end: int) -> None:
        self._raw = raw
        self._end = end

    def readline(self, limit: int) -> bytes:
        """Return the next line, at most `limit` bytes of it."""
        return self._raw.readline(min(limit, self._end - self._raw.tell()))


def bounded(raw: BinaryIO, span: Span) -> BinaryIO:
    """Return the stream of a span's lines; whole files are returned as they are."""
    if span.start:
        raw.seek(span.start)
    return raw if span.end is None else cast(BinaryIO, Bounded(raw, span.end))
