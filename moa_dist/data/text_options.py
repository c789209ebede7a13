"""Options for reading text, and counts of what was read."""

from __future__ import annotations

from dataclasses import dataclass, field

from moa_dist.config.prepare import BadLineRule, DocumentRule, ErrorRule, FormatRule
from moa_dist.data.left_out import LeftOut

DEFAULT_FIELD = "text"


@dataclass(frozen=True)
class TextOptions:
    """Configures how files become documents."""

    documents: DocumentRule = "file"
    """For plain text: a document is a whole file, lines up to a blank line, or a line."""
    json_field: str | None = None
    """For JSON, CSV, parquet and Arrow: the field or column that holds the text of each record,
    where `a.b` is field b of the object in field a; None for `text`."""
    errors: ErrorRule = "strict"
    """Whether text that is not UTF-8 is an error, or is replaced and counted."""
    max_bytes: int | None = None
    """Stop after this many UTF-8 bytes of text; the last document is cut to fit."""
    format: FormatRule = "auto"
    """How to read every file; auto recognizes each one."""
    bad_lines: BadLineRule = "stop"
    """Whether a record without readable text is an error, or is skipped and counted."""

    @property
    def field(self) -> str:
        """Return the name of the field that holds the text."""
        return self.json_field or DEFAULT_FIELD


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
    bad_lines: int = 0
    """Records skipped because they hold no readable text."""
    first_bad_line: str = ""
    """What is wrong with the first of them."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files, and members of archives, that were not read."""
    files_opened: int = 0
    """Files that were opened."""
    input_bytes: int = 0
    """Bytes read from disk, compressed or not."""
