"""Reading the files of zero-shot tasks, so that every complaint names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa_dist.data.text import content_suffix, decompressed, read_errors_named
from moa_dist.errors import DataError


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself, or the files in that folder with one of these suffixes, sorted."""
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path of the task")
        if not path.is_dir():
            return [path]
        found = sorted(f for f in path.iterdir() if content_suffix(f) in suffixes and f.is_file())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give another path") from error
    if not found:
        raise DataError(f"{path}: no file ending in {' or '.join(suffixes)}, compressed or not")
    return found


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Each line of a UTF-8 file, compressed or not, after its place: `FILE, line N`."""
    if not file.is_file():  # a pipe could block for ever
        raise DataError(f"{file}: not a regular file; give another path")
    with read_errors_named(file), file.open("rb") as raw:
        for number, line in enumerate(decompressed(file, raw), start=1):
            place = f"{file}, line {number}"
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason}); convert the file") from error


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSON Lines file after its place; blank lines are left out."""
    for place, line in read_lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}); mend the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: not a JSON object; mend the line")
        yield place, record


def text_field(place: str, record: dict[str, Any], *names: str) -> str:
    """The first of these fields that the record has: text that is not empty."""
    name = next((name for name in names if name in record), None)
    if name is None:
        raise DataError(
            f"{place}: no field {' or '.join(map(repr, names))} (the line has: "
            f"{', '.join(record) or 'nothing'}); is this another task's file?"
        )
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {name!r} must be text, and not empty; mend the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{place}: {name!r} is not valid Unicode; mend the line") from error
    return value
