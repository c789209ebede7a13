"""Divides inputs among the parts of a `prepare`, between documents, also inside one large file.

The bytes of all files, end to end, are cut into equal ranges, one per part. A file that lies across
a border is divided if documents in it can be found from anywhere: JSON Lines, and plain text whose
documents end at lines or blank lines, not compressed. Any other file belongs as a whole to the part
that holds its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moa_dist.data.compression import decompressed, read_errors_named, read_head
from moa_dist.data.spans import Span
from moa_dist.data.text import recognize
from moa_dist.data.text_options import TextOptions

_BLOCK_BYTES = 1 << 20


def divide(
    files: Sequence[Path], options: TextOptions, part: int, num_parts: int
) -> tuple[Span, ...]:
    """Return what part `part` of `num_parts`, counted from 1, reads of the files."""
    sizes = [path.stat().st_size for path in files]
    total, offset = sum(sizes), 0
    low, high = (total * border // num_parts for border in (part - 1, part))
    spans = []
    for path, size in zip(files, sizes, strict=True):
        start, end = low - offset, high - offset  # the part's range, seen from the file
        is_across = 0 < start < size or 0 < end < size
        if is_across and (splits_at := _division(path, options)) is not None:
            first = _document_start(path, start, splits_at)
            after = _document_start(path, end, splits_at)
            if first < after:
                spans.append(Span(path, first, after if after < size else None))
        elif start <= size // 2 < end or (part == num_parts and size // 2 >= end):
            spans.append(Span(path))
        offset += size
    return tuple(spans)


def _division(path: Path, options: TextOptions) -> str | None:
    """Return "line" or "blank-line" if documents start after such lines; None if unknown."""
    with read_errors_named(path), path.open("rb") as raw:
        if decompressed(path, raw) is not raw:
            return None
        kind = recognize(path, read_head(path, raw), options)
    if kind == "json-lines":
        return "line"
    return options.documents if kind == "text" and options.documents != "file" else None


def _document_start(path: Path, position: int, splits_at: str) -> int:
    """Return the offset of the first document that surely starts at or after a position."""
    if position <= 0:
        return 0
    with read_errors_named(path), path.open("rb") as raw:
        raw.seek(position - 1)
        at_line_start = False
        while block := raw.readline(_BLOCK_BYTES):
            ends_line = block.endswith(b"\n")
            is_blank = at_line_start and not block.strip()
            if ends_line and (is_blank or splits_at == "line"):
                break
            at_line_start = ends_line
        return raw.tell()
