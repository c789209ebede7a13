"""Turns any input into documents, one at a time.

What a file holds decides how it is read: its content, and its name where the content leaves it
open. A file that cannot be read as text is refused by name; nothing is dropped without being
counted. Documents come in pieces, so memory is bounded however large a file or a document is.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

from moa_dist.data.archives import is_tar, read_members
from moa_dist.data.compression import (
    content_suffix,
    decompressed,
    is_arrow,
    is_parquet,
    read_errors_named,
    read_head,
)
from moa_dist.data.decoding import Decoder
from moa_dist.data.input_kinds import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    JSONL_SUFFIXES,
    PARQUET_SUFFIXES,
    PLAIN_SUFFIXES,
    TAR_SUFFIXES,
)
from moa_dist.data.records import (
    Records,
    field_of,
    has_column,
    is_json_lines,
    looks_like_json,
    read_csv,
    read_json_lines,
    read_json_values,
)
from moa_dist.data.spans import Span, bounded
from moa_dist.data.tables import read_arrow, read_parquet
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.errors import DataError

Format = Literal["text", "json-lines", "json-values", "csv", "parquet", "arrow", "tar"]

_PIECE_CHARACTERS = 1 << 16
_PROSE_SUFFIXES = frozenset({".txt", ".text"})
_SOURCE_SUFFIXES = PLAIN_SUFFIXES - _PROSE_SUFFIXES


def read_documents(
    files: Sequence[Path], options: TextOptions, counts: TextCounts
) -> Iterator[Iterator[str]]:
    """Yield every document that is not empty, as an iterator over its pieces.

    What is left of a document is skipped when the next one is asked for.

    Args:
        files: files to read, as returned by `find_files`.
        options: how to split and decode them.
        counts: updated as pieces are consumed.

    Raises:
        DataError: a file cannot be read or decoded, or the input holds no text.
    """
    yield from read_spans([Span(path) for path in files], options, counts)
    check_any_text(len(files), counts)


def read_spans(
    spans: Sequence[Span],
    options: TextOptions,
    counts: TextCounts,
    *,
    first: int = 0,
    opening: Callable[[int], None] = lambda index: None,
) -> Iterator[Iterator[str]]:
    """Yield every document that is not empty in spans of files; see `read_documents`.

    Args:
        spans: what to read.
        options: how to split and decode it.
        counts: updated as pieces are consumed.
        first: index of the span to start with, where `counts` are those of the ones before it.
        opening: called with the index of each span before it is opened.
    """
    limit = options.max_bytes
    for index in range(first, len(spans)):
        opening(index)
        for pieces in _documents_with_text(spans[index], options, counts):
            yield pieces
            deque(pieces, maxlen=0)
            # The longest character may no longer fit.
            if limit is not None and counts.text_bytes > limit - 4:
                for span in spans[index:]:
                    counts.left_out.add("not read to the end, as --max-bytes says", span.path)
                return


def check_any_text(num_files: int, counts: TextCounts) -> None:
    """Raise DataError if what was read held no text."""
    if counts.documents == 0:
        bad = f", {counts.bad_lines} bad lines" if counts.bad_lines else ""
        raise DataError(
            f"the input holds no text ({num_files} files, {counts.empty} empty documents{bad}); "
            "give --input files that hold text",
            key="--input",
        )


def split_pieces(parts: Iterable[str], limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Regroup a text into pieces of at most `limit` characters, at line ends if possible.

    This bounds the tokenizer's memory (about 100 bytes per token) and lets it encode one huge
    document in parallel. The concatenated pieces are the text, however it came in parts; only the
    tokens next to a split may differ from those of the whole text.
    """
    waiting: list[str] = []
    length = 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if length > limit:
            text, start = "".join(waiting), 0
            while len(text) - start > limit:
                end = text.rfind("\n", start, start + limit) + 1 or start + limit
                yield text[start:end]
                start = end
            waiting, length = [text[start:]], len(text) - start
    yield "".join(waiting)


def _documents_with_text(
    span: Span, options: TextOptions, counts: TextCounts
) -> Iterator[Iterator[str]]:
    """Yield the documents of a span that are not empty, each as an iterator over its pieces."""
    for parts in _located_documents(span, options, counts):
        opening = _up_to_text(parts)
        if opening is None:
            counts.empty += 1
            continue
        counts.documents += 1
        yield split_pieces(_counted(chain(opening, parts), options.max_bytes, counts))


def _located_documents(
    span: Span, options: TextOptions, counts: TextCounts
) -> Iterator[Iterator[str]]:
    finished_bytes, path = counts.input_bytes, span.path
    counts.files_opened += 1
    with read_errors_named(path), path.open("rb") as raw:
        for parts in _documents_in(span, raw, options, counts):
            yield _located(parts, raw, finished_bytes - span.start, counts)
    counts.input_bytes = finished_bytes + span.size


def _documents_in(
    span: Span, raw: BinaryIO, options: TextOptions, counts: TextCounts
) -> Iterator[Iterator[str]]:
    """Yield the documents of a span, or of the members of an archive."""
    path = span.path
    kind = recognize(path, read_head(path, raw), options)
    stream = bounded(raw if kind == "parquet" else decompressed(path, raw), span)
    if kind != "tar":
        decoder = Decoder(path, options.errors, counts, span.first_line - 1, span.start)
        yield from _documents_of(kind, decoder, stream, options)
        return
    prefers_json = options.json_field is not None
    members = read_members(path, stream, counts.left_out, prefers_json=prefers_json)
    for member, content in members:
        with read_errors_named(member), content:
            yield from _documents_in(Span(member), content, options, counts)


def _located(
    parts: Iterator[str], raw: BinaryIO, finished_bytes: int, counts: TextCounts
) -> Iterator[str]:
    for part in parts:
        counts.input_bytes = finished_bytes + raw.tell()
        yield part


def recognize(path: Path, head: bytes, options: TextOptions) -> Format:
    """Return how to read a file, from its first bytes, its name and the user's choice.

    Raises:
        DataError: a field was named, but nothing shows where this file has fields.
    """
    suffix, chosen = content_suffix(path), options.format
    start = head.decode("utf-8-sig", errors="ignore")
    if is_parquet(head) or (suffix in PARQUET_SUFFIXES and chosen == "auto"):
        return "parquet"
    if is_arrow(head) or (suffix == ".arrow" and chosen == "auto"):
        return "arrow"
    if is_tar(head) or (suffix in TAR_SUFFIXES and chosen == "auto"):
        return "tar"
    if chosen == "auto":
        if suffix in JSON_SUFFIXES:
            chosen = "json"
        elif suffix in CSV_SUFFIXES:
            chosen = "csv"
        elif suffix in _SOURCE_SUFFIXES:
            chosen = "text"
        elif looks_like_json(start):
            chosen = "json"
        elif options.json_field is None or suffix in _PROSE_SUFFIXES or not start.strip():
            chosen = "text"
        elif has_column(start.lstrip().partition("\n")[0], options.field):
            chosen = "csv"
        else:
            raise DataError(
                f"{path}: holds neither JSON nor a CSV column '{options.field}', though "
                "--json-field names one; name the format with --format, or leave out --json-field",
                path=path,
                key="--json-field",
            )
    if chosen == "json":
        lines = is_json_lines(start, suffix in JSONL_SUFFIXES)
        return "json-lines" if lines else "json-values"
    return chosen


def _documents_of(
    kind: Format, decoder: Decoder, stream: BinaryIO, options: TextOptions
) -> Iterator[Iterator[str]]:
    """Yield the documents of a file, each as an iterator over parts of its text."""
    records: Records
    match kind:
        case "json-lines":
            records = read_json_lines(decoder, stream)
        case "json-values":
            records = read_json_values(decoder, stream)
        case "csv":
            records = read_csv(decoder, stream, options.field)
        case "parquet":
            records = read_parquet(decoder.path, stream, options.field)
        case "arrow":
            records = read_arrow(decoder.path, stream, options.field)
        case _:
            return _SPLITTERS[options.documents](decoder.parts(stream))
    return _texts(decoder.path, records, options, decoder.counts)


def _whole(parts: Iterator[str]) -> Iterator[Iterator[str]]:
    yield parts


def _by_blank_line(parts: Iterator[str]) -> Iterator[Iterator[str]]:
    first = next((part for part in parts if part.strip()), None)
    while first is not None:
        yield _paragraph(first, parts)
        first = next((part for part in parts if part.strip()), None)


def _paragraph(first: str, parts: Iterator[str]) -> Iterator[str]:
    """Yield the lines up to a blank one, without the end of the last."""
    last = first
    for part in parts:
        if not part.strip() and last.endswith("\n"):
            break
        yield last
        last = part
    yield last.rstrip("\r\n")


def _by_line(parts: Iterator[str]) -> Iterator[Iterator[str]]:
    for part in parts:
        yield _line(part, parts)


def _line(first: str, parts: Iterator[str]) -> Iterator[str]:
    part: str | None = first
    while part is not None and not part.endswith("\n"):
        yield part
        part = next(parts, None)
    if part is not None:
        yield part.rstrip("\r\n")


_SPLITTERS = {"file": _whole, "blank-line": _by_blank_line, "line": _by_line}


def _texts(
    path: Path, records: Records, options: TextOptions, counts: TextCounts
) -> Iterator[Iterator[str]]:
    """Yield the text of each record; bad ones are errors, or skipped and counted."""
    for line, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            text = field_of(path, line, record, options.field)
            text = _valid_unicode(path, line, text, options, counts)
        except DataError as error:
            if options.bad_lines == "stop":
                raise
            counts.bad_lines += 1
            counts.first_bad_line = counts.first_bad_line or str(error)
        else:
            yield iter((text,))


def _valid_unicode(
    path: Path, line: int, text: str, options: TextOptions, counts: TextCounts
) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        if options.errors == "strict":
            raise DataError(
                f"{path}, line {line}: character {error.start} of the text is not valid "
                "Unicode; fix the line, or use --errors replace",
                path=path,
                line=line,
                key=options.field,
            ) from error
        counts.replaced += 1
        return text.encode(errors="replace").decode()
    return text


def _up_to_text(parts: Iterator[str]) -> Iterator[str] | None:
    """Return the parts up to the first that is not white space; None if the document is empty."""
    packed: list[bytes] = []  # gigabytes of white space take little memory
    opening: list[str] = []
    length = 0
    for part in parts:
        opening.append(part)
        if part and not part.isspace():
            return chain((zlib.decompress(space).decode() for space in packed), opening)
        length += len(part)
        if length > _PIECE_CHARACTERS:
            packed.append(zlib.compress("".join(opening).encode(), level=1))
            opening, length = [], 0
    return None


def _counted(parts: Iterator[str], limit: int | None, counts: TextCounts) -> Iterator[str]:
    """Yield parts, counting their bytes, as far as the limit allows."""
    for part in parts:
        encoded = part.encode()
        if limit is not None and counts.text_bytes + len(encoded) > limit:
            encoded = encoded[: limit - counts.text_bytes]
            part = encoded.decode(errors="ignore")
            counts.text_bytes += len(part.encode())
            if part:
                yield part
            return
        counts.text_bytes += len(encoded)
        yield part
