"""Reads the files of zero-shot tasks; every error names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moa_dist.data.compression import content_suffix, decompressed, read_errors_named
from moa_dist.errors import DataError


class Location(NamedTuple):
    """Identifies a line of a file."""

    file: Path
    """The file."""
    line: int
    """The line, counted from 1."""

    def error(self, problem: str, key: str | None = None) -> DataError:
        """Create an error that names this line, and the field `key` if it is at fault."""
        message = f"{self.file}, line {self.line}: {problem}"
        return DataError(message, path=self.file, line=self.line, key=key)


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return `path` itself, or if it is a folder its files with one of these suffixes, sorted."""
    try:
        if not path.exists():
            raise DataError(
                f"{path}: no such file or folder; check the path of the task", path=path
            )
        if not path.is_dir():
            return [path]
        found = sorted(f for f in path.iterdir() if content_suffix(f) in suffixes and f.is_file())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give another path", path=path
        ) from error
    if not found:
        raise DataError(
            f"{path}: no file ending in {' or '.join(suffixes)}, compressed or not", path=path
        )
    return found


def read_lines(file: Path) -> Iterator[tuple[Location, str]]:
    """Yield each line of a UTF-8 file, compressed or not, with its location."""
    if not file.is_file():  # a pipe could block forever
        raise DataError(f"{file}: not a regular file; give another path", path=file)
    with read_errors_named(file), file.open("rb") as raw:
        for number, line in enumerate(decompressed(file, raw), start=1):
            location, encoding = Location(file, number), "utf-8-sig" if number == 1 else "utf-8"
            try:
                yield location, line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise location.error(f"not UTF-8 ({error.reason}); convert the file") from error


def read_records(file: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    """Yield each object of a JSON Lines file with its location; skip blank lines."""
    for location, line in read_lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise location.error(f"not JSON ({error}); fix the line") from error
        if not isinstance(record, dict):
            raise location.error("not a JSON object; fix the line")
        yield location, record


def text_field(location: Location, record: dict[str, Any], *names: str) -> str:
    """Return the first of these fields that the record has; it must be nonempty text."""
    name = next((name for name in names if name in record), None)
    if name is None:
        raise location.error(
            f"no field {' or '.join(map(repr, names))} (the line has: "
            f"{', '.join(record) or 'nothing'}); is this another task's file?",
            key=names[0],
        )
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise location.error(f"{name!r} must be nonempty text; fix the line", key=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise location.error(f"{name!r} is not valid Unicode; fix the line", key=name) from error
    return value
