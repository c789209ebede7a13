"""Opens files by what they hold: compressed streams are recognized by content before name.

Formats that hold no text as such, like PDF, are refused by name instead of being
read as bytes. Only parquet, Arrow and zstd need a package beyond the standard library (the
extra `formats`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from moa_dist.errors import DataError

HEAD_BYTES = 1 << 20
"""Bytes that recognizing a file may look at."""

_SUFFIXES = {
    ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "xz", ".zst": "zstd", ".zstd": "zstd",
}  # fmt: skip
COMPRESSED_SUFFIXES = frozenset(_SUFFIXES)

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_PARQUET = b"PAR1"
_ARROW = (b"ARROW1\0\0", b"\xff\xff\xff\xff")  # a file; a stream, whose first message follows
# Kinds that hold no text as such: where their mark is, the mark, and what they are.
_OTHER_KINDS = (
    (0, b"PK\x03\x04", "a zip archive (or an office document or e-book, which are zip archives)"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (0, b"\x04\x22\x4d\x18", "an lz4 stream"),
    (0, b"\xff\x06\x00\x00sNaPpY", "a snappy stream"),
    (0, b"LZIP\x01", "an lzip stream"),
    (0, b"\x1f\x9d", "a file of the program compress"),
    (0, b"%PDF-", "a PDF"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\x7fELF", "a program"),
    (0, b"\x89PNG\r\n", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
)
_CONTROL = bytes(set(range(32)) - set(b"\0\t\n\v\f\r\x1b"))


def content_suffix(path: Path) -> str:
    """Return the suffix of the decompressed content, in lower case."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return inner.suffix.lower()


def read_head(path: Path, raw: BinaryIO) -> bytes:
    """Return the beginning of a file's decompressed content, and rewind the file.

    Raises:
        DataError: the content is of a kind that cannot be read as text, which the message names,
            or the package that decompresses it is missing.
    """
    stream = decompressed(path, raw)
    head = stream.read(HEAD_BYTES)
    raw.seek(0)
    if stream is not raw and (inner := _compression(head)):
        refuse(path, f"a {inner} stream inside of another compressed stream", "decompress it")
    for start, mark, kind in _OTHER_KINDS:
        if head.startswith(mark, start):
            refuse(path, kind, "unpack or convert it to text or JSON Lines")
    return head


def is_parquet(head: bytes) -> bool:
    """Return whether a file begins as parquet does."""
    return head.startswith(_PARQUET)


def is_arrow(head: bytes) -> bool:
    """Return whether a file begins as an Arrow file or stream does.

    The first message of a stream is a schema, of at most a few MB.
    """
    return head.startswith(_ARROW[0]) or (head.startswith(_ARROW[1]) and head[7:8] == b"\0")


def looks_binary(head: bytes) -> bool:
    """Return whether bytes that are not UTF-8 have control characters that no encoding has."""
    return len(head) - len(head.translate(None, _CONTROL)) > len(head) / 50


def refuse(path: Path, kind: str, remedy: str) -> NoReturn:
    """Raise the error for a file of a kind that cannot be read."""
    raise DataError(f"{path}: this is {kind}; {remedy}", path=path)


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """Return the stream of a file's decompressed content, from its beginning."""
    start = raw.read(10)
    raw.seek(0)
    match _compression(start) or _SUFFIXES.get(path.suffix.lower()):
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        case "bzip2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case "zstd":
            return io.BufferedReader(_ZstdStream(path, raw), HEAD_BYTES)
        case _:
            return raw


def _compression(start: bytes) -> str | None:
    return next((kind for mark, kind in _COMPRESSED.items() if start.startswith(mark)), None)


def import_pyarrow(path: Path, kind: str) -> Any:
    """Import pyarrow, which reads `kind`; raise a DataError with the remedy if it is missing."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path}: reading {kind} needs pyarrow: pip install 'moa-dist[formats]'", path=path
        ) from error
    return pyarrow


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd; unlike some readers, it raises an error if the end is missing."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        pyarrow = import_pyarrow(path, "zstd")
        self._empty = not raw.read(1)  # the library calls an empty file truncated
        raw.seek(0)
        self._stream = pyarrow.CompressedInputStream(
            pyarrow.PythonFile(_Lent(raw), mode="r"), "zstd"
        )
        self._error: type[Exception] = pyarrow.ArrowException

    def readable(self) -> bool:
        """Return True, as the buffer on top of this stream requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; return the number of bytes, 0 at the end."""
        if self._empty:
            return 0
        try:
            content = self._stream.read(len(buffer))
        except self._error as error:
            raise OSError(str(error)) from error
        buffer[: len(content)] = content
        return len(content)


class _Lent:
    """A stream that stays open when the library, which is done with it, closes it."""

    closed = False

    def __init__(self, raw: BinaryIO) -> None:
        self.read = raw.read

    def close(self) -> None:
        pass


@contextmanager
def read_errors_named(path: Path) -> Iterator[None]:
    """Convert errors raised while reading `path` to a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); it may be truncated or damaged, copy it again",
            path=path,
        ) from error
