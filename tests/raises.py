"""Expects errors by their fields and values instead of their wording."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import ANY

import pytest

from moa_dist.errors import DataError


def raises_data_error(
    *values: object, path: Path | None = ANY, line: int | None = ANY, key: str | None = ANY
) -> pytest.RaisesExc[DataError]:
    """Expect a DataError with these fields, and with all `values` in its message."""

    def check(error: DataError) -> bool:
        found, expected = (error.path, error.line, error.key), (path, line, key)
        missing = [value for value in values if str(value) not in str(error)]
        if found != expected or missing:
            raise AssertionError(f"{found} is not {expected}, or lacks {missing}: {error}")
        return True

    return pytest.RaisesExc(DataError, check=check)
