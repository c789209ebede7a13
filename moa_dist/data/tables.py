"""Reads records from tables of columns: parquet and Arrow, by pyarrow (the extra `formats`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from moa_dist.data.compression import HEAD_BYTES, import_pyarrow
from moa_dist.data.records import Records
from moa_dist.errors import DataError

_ROWS_AT_ONCE = 256


def read_parquet(path: Path, stream: BinaryIO, field: str) -> Records:
    """Yield each row as a mapping that holds at least the column of `field`.

    Raises:
        DataError: no column has that name, or the extra `formats` is missing.
    """
    pyarrow = import_pyarrow(path, "parquet")
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=HEAD_BYTES)
        column = _column(path, file.schema_arrow.names, field)
        yield from _rows(file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]), column)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def read_arrow(path: Path, stream: BinaryIO, field: str) -> Records:
    """Yield each row of an Arrow stream, as data sets of Hugging Face are saved, or Arrow file.

    Batches are held in memory one at a time.

    Raises:
        DataError: no column has that name, or the extra `formats` is missing.
    """
    pyarrow = import_pyarrow(path, "Arrow")
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    try:
        reader = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
        column = _column(path, reader.schema.names, field)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows(batches, column)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _column(path: Path, names: Sequence[str], field: str) -> str:
    """Return the column that is the field, or holds it."""
    column = field if field in names else field.partition(".")[0]
    if column not in names:
        raise DataError(
            f"{path}: no column '{column}' (the file has: {', '.join(names)}); name the right "
            "column with --json-field",
            path=path,
            key=field,
        )
    return column


def _rows(batches: Iterable[Any], column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for value in batch.slice(start, _ROWS_AT_ONCE).column(column).to_pylist():
                row += 1
                yield row, {column: value}
