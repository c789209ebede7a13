"""Reads UTF-8 text line by line, in bounded memory even if a file is one endless line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moa_dist.config.prepare import ErrorRule
from moa_dist.data.compression import decompressed, looks_binary, read_errors_named
from moa_dist.data.text_options import TextCounts
from moa_dist.errors import DataError

MAX_RECORD_BYTES = 1 << 28
"""Longest line of JSON Lines or CSV, and longest JSON value, that is read."""
_PART_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Decoder:
    """Decodes the lines of one file; errors name the file, the line and the byte."""

    path: Path
    """The file, for messages."""
    errors: ErrorRule | None
    """What to do with text that is not UTF-8; None if the only remedy is to convert the file."""
    counts: TextCounts
    """Counts the lines in which something was replaced."""
    line: int = 0
    """Number of the current line, counted from 1."""
    offset: int = 0
    """Bytes of the file before the next one to decode."""
    _continues: bool = False

    def parts(self, stream: BinaryIO) -> Iterator[str]:
        """Yield lines with their ends; a line of more than a MiB comes in several parts."""
        rest = b""
        while raw := stream.readline(_PART_BYTES):
            raw = rest + raw
            rest = b"" if raw.endswith(b"\n") else _incomplete_character(raw)
            yield self.decode(raw.removesuffix(rest))
        if rest:
            yield self.decode(rest)

    def lines(self, stream: BinaryIO) -> Iterator[str]:
        """Yield whole lines with their ends.

        Raises:
            DataError: a line is longer than `MAX_RECORD_BYTES`.
        """
        for raw in whole_lines(self.path, stream):
            yield self.decode(raw)

    def decode(self, raw: bytes) -> str:
        """Decode the next line, or part of a line.

        Raises:
            DataError: it is not UTF-8 and must not be replaced.
        """
        self.line += not self._continues
        self._continues = not raw.endswith(b"\n")
        # Splitting at newlines first is safe: no other UTF-8 character contains that byte.
        text = raw.removeprefix(_BYTE_ORDER_MARK) if self.offset == 0 else raw
        start = self.offset + len(raw) - len(text)
        self.offset += len(raw)
        try:
            if b"\0" in text:  # UTF-16 without a mark decodes as UTF-8 full of NUL characters
                at = text.index(b"\0")
                raise UnicodeDecodeError("utf-8", text, at, at + 1, "a NUL byte, as UTF-16 has")
            return text.decode()
        except UnicodeDecodeError as error:
            if self.errors != "replace" or looks_binary(text):
                remedy = "convert the file"
                if looks_binary(text):
                    remedy = "it looks like binary data; convert it to text or JSON Lines"
                elif self.errors:
                    remedy += ", or use --errors replace"
                raise DataError(
                    f"{self.path}: not UTF-8 at byte {start + error.start} of the text "
                    f"({error.reason}); {remedy}",
                    path=self.path,
                    line=self.line,
                ) from error
            self.counts.replaced += 1
            return text.decode(errors="replace").replace("\0", "\ufffd")


def whole_lines(path: Path, stream: BinaryIO, first: int = 1) -> Iterator[bytes]:
    """Yield whole lines with their ends, of which the first has the number `first`.

    Raises:
        DataError: a line is longer than `MAX_RECORD_BYTES`.
    """
    number = first - 1
    while raw := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(raw) > MAX_RECORD_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {MAX_RECORD_BYTES:,} bytes; split the record",
                path=path,
                line=number,
            )
        yield raw


def read_lines(path: Path) -> Iterator[str]:
    """Yield every line of a file, compressed or not, without its line end.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; check the path", path=path)
    with read_errors_named(path), path.open("rb") as raw:
        for line in Decoder(path, None, TextCounts()).lines(decompressed(path, raw)):
            yield line.rstrip("\r\n")


def _incomplete_character(raw: bytes) -> bytes:
    """Return the bytes of a character that the end of `raw` cuts, or none."""
    for length in range(1, min(4, len(raw)) + 1):
        byte = raw[-length]
        if byte & 0xC0 != 0x80:  # the first byte of a character, not a continuation
            size = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return raw[-length:] if size > length else b""
    return b""
