"""Finds the files of the input, and names what it leaves out."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from moa_dist.data.compression import COMPRESSED_SUFFIXES, content_suffix, read_head
from moa_dist.data.manifest import MANIFEST_FILE
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
_KNOWN = PLAIN_SUFFIXES | JSON_SUFFIXES | CSV_SUFFIXES | PARQUET_SUFFIXES
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"})
_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
_MOST_NAMED = 5


@dataclass
class LeftOut:
    """Counts what was left out of the folders, by reason, with the names of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    """Files or folders left out for each reason."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first of them."""

    def add(self, reason: str, path: Path) -> None:
        """Count a file or folder."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < _MOST_NAMED:
            names.append(str(path))

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} {reason} ({', '.join(self.names[reason])}"
            f"{', ...' if count > _MOST_NAMED else ''})"
            for reason, count in self.counts.items()
        )


def find_files(
    inputs: Sequence[str], stdin: BinaryIO | None, spool: Path, left_out: LeftOut | None = None
) -> list[Path]:
    """Resolve files, folders (recursively, sorted, known kinds) and `-` (stdin).

    Args:
        inputs: paths, or `-`.
        stdin: stream to read `-` from; None for the process's stdin.
        spool: file to copy stdin to, because text is read more than once. Pipes that a shell
            names, such as /dev/fd/63, are copied next to it.
        left_out: counts what the folders hold and is not read.

    Raises:
        DataError: an input does not exist, or a folder holds no text file.
    """
    left_out = LeftOut() if left_out is None else left_out
    files: list[Path] = []
    for number, name in enumerate(inputs):
        path = Path(name)
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}); check --input", path=path
            ) from error
        if name == "-":
            if spool not in files:
                files.append(_copied(stdin or sys.stdin.buffer, spool))
        elif is_folder:
            files.extend(_files_in(path, left_out, spool))
        elif is_file:
            files.append(path)
        elif name.startswith(_STREAMS) and path.exists():
            with path.open("rb") as stream:
                files.append(_copied(stream, spool.with_name(f"{spool.name}-{number}")))
        else:
            raise DataError(f"{path}: no such file or folder; check --input", path=path)
    return files


def _copied(stream: BinaryIO, spool: Path) -> Path:
    with spool.open("wb") as out:
        shutil.copyfileobj(stream, out)
    return spool


def _files_in(folder: Path, left_out: LeftOut, spool: Path) -> list[Path]:
    # The hidden folder of this work may lie in the folder.
    own = {os.path.realpath(parent) for parent in spool.parents}
    try:
        found = sorted(_walk(folder, {os.path.realpath(folder)}, left_out, own))
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); check --input",
            path=folder,
        ) from error
    if not found:
        remains = f", only {left_out}" if left_out.counts else ""
        raise DataError(
            f"{folder}: no text files in this folder{remains}; known suffixes are "
            f"{' '.join(sorted(_KNOWN))}, optionally followed by one of "
            f"{' '.join(sorted(COMPRESSED_SUFFIXES))}. "
            "A file given by name may have any suffix",
            path=folder,
        )
    return found


def _walk(folder: Path, seen: set[str], left_out: LeftOut, own: set[str]) -> Iterator[Path]:
    """Yield the files to read, following links; `seen` holds the real paths of folders."""
    names = sorted(os.listdir(folder))
    if MANIFEST_FILE in names and "shard-000000.tar" in names:
        left_out.add("folders of prepared shards", folder)
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            if os.path.realpath(path) not in own:
                left_out.add("hidden", path)
        elif path.is_dir():
            real = os.path.realpath(path)
            if real in seen:
                left_out.add("links to folders that are read anyway", path)
            else:
                seen.add(real)
                yield from _walk(path, seen, left_out, own)
        elif reason := _reason_to_leave_out(path):
            left_out.add(reason, path)
        else:
            yield path


def _reason_to_leave_out(path: Path) -> str | None:
    if not path.is_file():
        return "broken links" if path.is_symlink() else "not regular files"
    suffix = content_suffix(path)
    if suffix in _KNOWN:
        return None
    if suffix in _ARCHIVES or path.suffix.lower() in _ARCHIVES:
        return "archives, to unpack first"
    if suffix or not (path.suffix.lower() in COMPRESSED_SUFFIXES or _holds_text(path)):
        return "of unknown kind"
    return None


def _holds_text(path: Path) -> bool:
    """Return whether a file without a suffix, such as `part-00000`, holds UTF-8 text."""
    try:
        head = read_head(path)
        # The end of the head may cut a character.
        head[: max(len(head) - 4, 0) or len(head)].decode()
    except (OSError, EOFError, UnicodeDecodeError, DataError):
        return False
    return bool(head.strip()) and b"\0" not in head
