"""Reads documents from files, folders and stdin, one at a time.

Formats are plain text and JSON Lines, optionally compressed with gzip, bzip2 or xz. Text is read
line by line, so a file of any size can be read as long as each document fits in memory.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from moa_dist.errors import DataError

DocumentRule = Literal["file", "blank-line"]
ErrorRule = Literal["strict", "replace"]

# fmt: off
PLAIN_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".json",
    ".yaml", ".yml", ".toml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go",
    ".java", ".js", ".ts", ".sh", ".sql",
})
# fmt: on
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextOptions:
    """Configures how files become documents."""

    documents: DocumentRule = "file"
    """For plain text: a document is a whole file, or lines up to a blank line."""
    json_field: str = "text"
    """For JSON Lines: the field that holds the text. Every line is a document."""
    errors: ErrorRule = "strict"
    """Whether text that is not UTF-8 is an error, or is replaced and counted."""
    max_bytes: int | None = None
    """Stop after this many UTF-8 bytes of text; the last document is cut to fit."""


@dataclass
class TextCounts:
    """Counts what `read_documents` has read so far; updated while documents are consumed."""

    documents: int = 0
    """Documents yielded."""
    text_bytes: int = 0
    """UTF-8 bytes yielded."""
    empty: int = 0
    """Documents skipped because they hold only white space."""
    replaced: int = 0
    """Lines in which something was not UTF-8 and was replaced."""
    input_bytes: int = 0
    """Bytes read from disk, compressed or not."""


def find_files(inputs: Sequence[str], stdin: BinaryIO | None, spool: Path) -> list[Path]:
    """Resolve files, folders (recursively, sorted, known suffixes) and `-` (stdin).

    Args:
        inputs: paths, or `-`.
        stdin: stream to read `-` from; None for the process's stdin.
        spool: file to copy stdin to, because text is read more than once.

    Raises:
        DataError: an input does not exist, or a folder holds no text file.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}); check --input", path=path
            ) from error
        if name == "-" and spool not in files:
            with spool.open("wb") as out:
                shutil.copyfileobj(stdin or sys.stdin.buffer, out)
            files.append(spool)
        elif is_folder:
            files.extend(_files_in(path))
        elif is_file:
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; check --input", path=path)
    return files


def read_documents(
    files: Sequence[Path], options: TextOptions, counts: TextCounts
) -> Iterator[tuple[str, int]]:
    """Yield every document that is not empty, with its number of UTF-8 bytes.

    Args:
        files: files to read, as returned by `find_files`.
        options: how to split and decode them.
        counts: updated as documents are yielded.

    Raises:
        DataError: a file cannot be read or decoded, or the input holds no text.
    """
    for text in _all_documents(files, options, counts):
        if not text.strip():
            counts.empty += 1
            continue
        encoded = text.encode()
        if options.max_bytes is not None:
            encoded = encoded[: options.max_bytes - counts.text_bytes]
            text = encoded.decode(errors="ignore")
            encoded = text.encode()
        if text:
            counts.documents += 1
            counts.text_bytes += len(encoded)
            yield text, len(encoded)
        if options.max_bytes is not None and counts.text_bytes > options.max_bytes - 4:
            break  # the longest character may no longer fit
    if counts.documents == 0:
        raise DataError(
            f"the input holds no text ({len(files)} files, {counts.empty} empty documents); "
            "give --input files that hold text",
            key="--input",
        )


def read_lines(path: Path) -> Iterator[str]:
    """Yield every line of a file, compressed or not, without its line end.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; check the path", path=path)
    with read_errors_named(path), path.open("rb") as raw:
        for line in _decoded(path, decompressed(path, raw), None, TextCounts()):
            yield line.rstrip("\r\n")


def _all_documents(
    files: Sequence[Path], options: TextOptions, counts: TextCounts
) -> Iterator[str]:
    finished_bytes = 0
    for path in files:
        with read_errors_named(path), path.open("rb") as raw:
            for text in _documents_of(path, decompressed(path, raw), options, counts):
                counts.input_bytes = finished_bytes + raw.tell()
                yield text
        finished_bytes += path.stat().st_size
        counts.input_bytes = finished_bytes


def _files_in(folder: Path) -> list[Path]:
    known = PLAIN_SUFFIXES | JSONL_SUFFIXES
    found = sorted(f for f in folder.rglob("*") if content_suffix(f) in known and f.is_file())
    if not found:
        raise DataError(
            f"{folder}: no text files in this folder; known suffixes are "
            f"{' '.join(sorted(known))}, optionally followed by one of "
            f"{' '.join(sorted(COMPRESSED_SUFFIXES))}. "
            "A file given by name may have any suffix",
            path=folder,
        )
    return found


def content_suffix(path: Path) -> str:
    """Return the suffix of the decompressed content, in lower case."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return inner.suffix.lower()


def decompressed(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Iterate over the decompressed lines of a file, each with its newline."""
    match path.suffix.lower():
        case ".gz":
            return iter(gzip.GzipFile(fileobj=raw))
        case ".bz2":
            return iter(bz2.BZ2File(raw))
        case ".xz":
            return iter(lzma.LZMAFile(raw))
        case _:
            return iter(raw)


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


def _documents_of(
    path: Path, raw_lines: Iterator[bytes], options: TextOptions, counts: TextCounts
) -> Iterator[str]:
    lines = _decoded(path, raw_lines, options.errors, counts)
    if content_suffix(path) in JSONL_SUFFIXES:
        return _json_documents(path, lines, options, counts)
    if options.documents == "file":
        return iter(["".join(lines)])
    return _blank_line_documents(lines)


def _decoded(
    path: Path, raw_lines: Iterator[bytes], errors: ErrorRule | None, counts: TextCounts
) -> Iterator[str]:
    """Decode lines; `errors` is None if the only remedy is to convert the file."""
    offset = 0
    for number, raw in enumerate(raw_lines, start=1):
        # Splitting at newlines first is safe: no other UTF-8 character contains that byte.
        line = raw.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else raw
        try:
            if b"\0" in line:  # UTF-16 without a mark decodes as UTF-8 full of NUL characters
                at = line.index(b"\0")
                raise UnicodeDecodeError("utf-8", line, at, at + 1, "a NUL byte, as UTF-16 has")
            yield line.decode()
        except UnicodeDecodeError as error:
            if errors != "replace":
                at = offset + len(raw) - len(line) + error.start
                remedy = "convert the file" + (", or use --errors replace" if errors else "")
                raise DataError(
                    f"{path}: not UTF-8 at byte {at} of the text ({error.reason}); {remedy}",
                    path=path,
                    line=number,
                ) from error
            counts.replaced += 1
            yield line.decode(errors="replace").replace("\0", "\ufffd")
        offset += len(raw)


def _blank_line_documents(lines: Iterator[str]) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).rstrip("\r\n")
            document = []
    if document:
        yield "".join(document).rstrip("\r\n")


def _json_documents(
    path: Path, lines: Iterator[str], options: TextOptions, counts: TextCounts
) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also absurdly long numbers
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); fix the line", path=path, line=number
            ) from error
        text = record.get(options.json_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(record) if isinstance(record, dict) else "not an object"
            raise DataError(
                f"{path}, line {number}: no text in field '{options.json_field}' (the line has: "
                f"{fields}); name the right field with --json-field",
                path=path,
                line=number,
                key=options.json_field,
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            if options.errors == "strict":
                raise DataError(
                    f"{path}, line {number}: character {error.start} of the text is not valid "
                    "Unicode; fix the line, or use --errors replace",
                    path=path,
                    line=number,
                    key=options.json_field,
                ) from error
            counts.replaced += 1
            text = text.encode(errors="replace").decode()
        yield text
