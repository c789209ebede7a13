"""The prepare section: how text that was never prepared becomes shards."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from moa_dist.config.section import FolderPath, Section

ErrorRule = Literal["strict", "replace"]
DocumentRule = Literal["file", "blank-line", "line"]
FormatRule = Literal["auto", "text", "json", "csv"]
BadLineRule = Literal["stop", "skip"]


class PrepareConfig(Section):
    """How text that `data.train` and `data.valid` name directly becomes shards.

    The first start prepares it, with the options of `moa-dist prepare` below.
    """

    tokenizer: FolderPath | None = None
    """A `tokenizer.json`, or a folder with one; null for that of the first folder in `data.train`
    and `data.valid` that was prepared or, if all are text, for one that is trained on the first."""
    end_of_document: str | None = None
    """Token of `tokenizer` that ends documents; null to find it."""
    vocab_size: PositiveInt = 8000
    """Size of the tokenizer that is trained if there is none."""
    documents: DocumentRule = "file"
    """How plain text splits into documents: by file, at blank lines, or by line."""
    json_field: str | None = None
    """Field of JSON, or column of a table, that holds the text; null for `text`."""
    format: FormatRule = "auto"
    """How to read every file; auto recognizes each one."""
    bad_lines: BadLineRule = "stop"
    """Whether a record without readable text is an error, or is skipped."""
    errors: ErrorRule = "strict"
    """Whether text that is not UTF-8 is an error, or is replaced."""
    folder: FolderPath | None = None
    """Where the shards are kept, apart from other caches and without their limit; null for `text`
    in the folder of `data.cache`. Nodes that share it prepare once for all."""
