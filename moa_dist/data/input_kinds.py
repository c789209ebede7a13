"""Kinds of files by the ends of their names; their content decides where it can."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from moa_dist.data.compression import COMPRESSED_SUFFIXES, content_suffix, read_head
from moa_dist.errors import DataError

# fmt: off
PLAIN_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".yaml", ".yml", ".toml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh",
    ".sql",
})
# fmt: on
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
JSON_SUFFIXES = JSONL_SUFFIXES | {".json"}
CSV_SUFFIXES = frozenset({".csv", ".tsv"})
PARQUET_SUFFIXES = frozenset({".parquet"})
TAR_SUFFIXES = frozenset({".tar", ".tgz", ".tbz2", ".txz"})
KNOWN_SUFFIXES = (
    PLAIN_SUFFIXES | JSON_SUFFIXES | CSV_SUFFIXES | PARQUET_SUFFIXES | TAR_SUFFIXES | {".arrow"}
)
_OTHER_ARCHIVES = frozenset({".zip", ".7z", ".rar"})


def has_known_suffix(path: Path) -> bool:
    """Return whether a file's name alone shows that it can be read."""
    return content_suffix(path) in KNOWN_SUFFIXES


def has_no_suffix(path: Path) -> bool:
    """Return whether a file's name, such as `part-00000`, says nothing about its content."""
    return not path.suffix


def unknown_kind(path: Path) -> str | None:
    """Return why a file with this name is not read; None if it is, or its content decides."""
    suffix = content_suffix(path)
    if suffix in _OTHER_ARCHIVES:
        return "archives, to unpack first"
    return None if suffix in KNOWN_SUFFIXES or not suffix else "of unknown kind"


def holds_text(path: Path, raw: BinaryIO) -> bool:
    """Return whether a file begins with UTF-8 text, and rewind it."""
    try:
        head = read_head(path, raw)
        # The end of the head may cut a character.
        head[: max(len(head) - 4, 0) or len(head)].decode()
    except (OSError, EOFError, UnicodeDecodeError, DataError):
        return False
    return bool(head.strip()) and b"\0" not in head


def list_of_kinds() -> str:
    """Name the kinds, for messages."""
    return (
        f"known suffixes are {' '.join(sorted(KNOWN_SUFFIXES))}, optionally followed by one of "
        f"{' '.join(sorted(COMPRESSED_SUFFIXES))}"
    )
