"""Reads records: JSON Lines, other JSON and CSV; `tables.py` reads those of columns.

Each reader yields (line or row, record), where a record that cannot be read is the error that says
why. So one bad line need not end the reading; `field_of` does the same for the field that holds
the text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moa_dist.data.compression import HEAD_BYTES
from moa_dist.data.decoding import MAX_RECORD_BYTES, Decoder, whole_lines
from moa_dist.errors import DataError

Records = Iterator[tuple[int, Any]]
_DELIMITERS = ",\t;|"
_SPACE = re.compile(r"[\s,\x1e]*")
_OBJECT = re.compile(r'\s*(\[\s*)?\{\s*("(?:[^"\\\n]|\\.)*"\s*:|\}\s*$)')
_PARSER = json.JSONDecoder()


def looks_like_json(start: str) -> bool:
    """Return whether text begins as a JSON object with a key, or an array of them, does."""
    return _OBJECT.match(start) is not None


def is_json_lines(start: str, suffix_says_so: bool) -> bool:
    """Return whether every line of JSON is a value by itself, judging by the first few.

    Args:
        start: at most the first `HEAD_BYTES` of the file.
        suffix_says_so: whether the name says that they are, so that others are damaged.
    """
    first, end, _ = start.lstrip().partition("\n")
    if first.startswith("[") or first.rstrip() == "{" or (not end and len(start) > HEAD_BYTES // 4):
        return False  # the last: a line that may have no end, so it is read in parts
    return suffix_says_so or any(map(_begins_with_object, start.split("\n", 3)[:3]))


def _begins_with_object(line: str) -> bool:
    try:
        return isinstance(_PARSER.raw_decode(line.strip())[0], dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(decoder: Decoder, stream: BinaryIO) -> Records:
    """Yield the values of each line that is not blank; usually a line holds one."""
    path = decoder.path
    lines = whole_lines(path, stream, decoder.line + 1)
    for number, raw in enumerate(lines, start=decoder.line + 1):
        try:
            line = decoder.decode(raw).strip()
        except DataError as error:
            yield number, error
            continue
        if not line:
            continue
        try:
            for value in _values(line):
                yield number, value
        except (ValueError, RecursionError) as error:  # ValueError: also absurdly long numbers
            yield number, _not_json(path, number, error)


def _values(line: str) -> list[Any]:
    try:
        return [json.loads(line)]
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
    values, at = [], 0  # a lost line end leaves two records in one line
    while at < len(line):
        value, at = _PARSER.raw_decode(line, at)
        values.append(value)
        while at < len(line) and line[at].isspace():
            at += 1
    return values


def read_json_values(decoder: Decoder, stream: BinaryIO) -> Records:
    """Yield the values of JSON that is an array, or values one after the other.

    Lines do not matter, so reading cannot go on after a value that is damaged.
    """
    path, parts = decoder.path, decoder.parts(stream)
    text, at, line, array = "", 0, 1, False
    while True:
        end = _skip(text, at)
        line, at = line + text.count("\n", at, end), end
        if at == len(text):
            text, at = next(parts, ""), 0
            if text:
                continue
            if array:
                raise _not_json(path, line, "the array has no end; is the file complete?")
            return
        if not array and text[at] == "[":
            array, at = True, at + 1
            continue
        if array and text[at] == "]":
            array, at = False, at + 1
            continue
        try:
            value, end = _PARSER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            more = _more(parts, len(text) - at) if _may_go_on(error, len(text), at) else ""
            if not more:
                raise _not_json(path, line + text.count("\n", at, error.pos), error.msg) from error
            text, at = text[at:] + more, 0
            continue
        except (ValueError, RecursionError) as error:
            raise _not_json(path, line, error) from error
        yield line, value
        line, at = line + text.count("\n", at, end), end


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _may_go_on(error: json.JSONDecodeError, length: int, start: int) -> bool:
    """Return whether a value is cut off by the end of the text so far, rather than wrong."""
    cut = error.msg.startswith("Unterminated string") or error.pos >= length - 10
    return cut and length - start < MAX_RECORD_BYTES


def _more(parts: Iterator[str], wanted: int) -> str:
    """Return at least `wanted` characters, so that a long value is not parsed again too often."""
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(part)
        if size >= wanted:
            break
    return "".join(found)


def _not_json(path: Path, line: int, reason: object) -> DataError:
    return DataError(
        f"{path}, line {line}: not JSON ({reason}); fix the line, leave out bad lines with "
        "--bad-lines skip, or read the file as plain text with --format text",
        path=path,
        line=line,
    )


def read_csv(decoder: Decoder, stream: BinaryIO, field: str) -> Records:
    """Yield each row as a mapping from the names in the first row.

    The delimiter is the one with which the first row names `field`.

    Raises:
        DataError: no column has that name.
    """
    path = decoder.path
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = decoder.lines(stream)
    first = next((line for line in lines if line.strip()), "")
    header, delimiter = _header(first, field)
    if field not in header:
        raise DataError(
            f"{path}: no column '{field}' (the first row has: {', '.join(header)}); name the right "
            "column with --json-field, or read the file as plain text with --format text",
            path=path,
            line=decoder.line,
            key=field,
        )
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = decoder.line + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield number, _bad_row(path, number, str(error))
            continue
        if row is None:
            return
        if row and len(row) != len(header):
            reason = f"{len(row)} columns, but the first row has {len(header)}"
            yield number, _bad_row(path, number, reason)
        elif row:
            yield number, dict(zip(header, row, strict=True))


def has_column(first_line: str, field: str) -> bool:
    """Return whether a line may be the first of a CSV file that has this column."""
    return field in _header(first_line, field)[0]


def _header(line: str, field: str) -> tuple[list[str], str]:
    """Return the names in the first row, and the delimiter."""
    found = []
    for delimiter in _DELIMITERS:
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        found.append((field in names, len(names), names, delimiter))
    _, _, names, delimiter = max(found, key=lambda item: item[:2])
    return names, delimiter


def _bad_row(path: Path, number: int, reason: str) -> DataError:
    return DataError(
        f"{path}, line {number}: not a row of CSV ({reason}); fix the row, or leave out bad rows "
        "with --bad-lines skip",
        path=path,
        line=number,
    )


def field_of(path: Path, line: int, record: Any, field: str) -> str:
    """Return the text in a record's field; `a.b` is field b of the object in field a.

    Raises:
        DataError: the field is missing, null or no text.
    """
    value, problem = _find(record, field)
    if problem is None and isinstance(value, str):
        return value
    if problem is None and value is None:
        problem = f"field '{field}' is null; leave out such lines with --bad-lines skip"
    elif problem is None and isinstance(value, dict):
        inner = next((name for name, inner in value.items() if isinstance(inner, str)), "NAME")
        problem = (
            f"no text in field '{field}', but an object (it has: {', '.join(value)}); "
            f"name a field in it with --json-field {field}.{inner}"
        )
    elif problem is None:
        problem = (
            f"no text in field '{field}', but {_kind(value)}; name the right field with "
            "--json-field, or leave out such lines with --bad-lines skip"
        )
    raise DataError(f"{path}, line {line}: {problem}", path=path, line=line, key=field)


def _find(record: Any, field: str) -> tuple[Any, str | None]:
    """Return the value of a field, and the problem if it is missing."""
    if not isinstance(record, dict):
        return None, (
            f"not an object, but {_kind(record)}; every record needs the field of --json-field"
        )
    if field in record:
        return record[field], None
    value, place = record, "the line has"
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            has = ", ".join(value) if isinstance(value, dict) else _kind(value)
            return None, (
                f"no field '{field}' ({place}: {has}); name the right field with --json-field, or "
                "leave out such lines with --bad-lines skip"
            )
        value, place = value[name], f"'{name}' has"
    return value, None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", list: "an array", str: "a string"}
    return names.get(type(value), "a number")
