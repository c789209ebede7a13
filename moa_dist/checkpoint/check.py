"""Checks a checkpoint's files against their checksums; no engine is needed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moa_dist.checkpoint.format import INDEX_FILE, SUMS_FILE, Index, Reader, checkpoints
from moa_dist.errors import DataError

_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Return a line for each problem with a checkpoint; empty if it is valid.

    Reads every file. Ranks may share the work: each reads every `world_size`-th file.
    """
    try:
        index = Reader(folder).index
        sums = read_sums(folder)
    except DataError as error:
        return [str(error)]
    problems = incomplete(folder, index)
    for file in sorted({*index.files, INDEX_FILE} - sums.keys()):
        problems.append(f"{folder / SUMS_FILE}: lacks {file}")
    if problems:
        return problems
    return list(altered(folder, {file: sums[file] for file in sorted(sums)[rank::world_size]}))


def altered(folder: Path, sums: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each file that is not as it was written."""
    for file, expected in sums.items():
        try:
            with (folder / file).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            yield f"{folder / file}: cannot be read: {error.strerror}"
        else:
            if found != expected:
                yield f"{folder / file}: altered since it was written"


def require_valid(folder: Path) -> None:
    """Raise DataError if a checkpoint is damaged."""
    problems = damage(folder)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(
            f"{folder} is damaged:{lines}\nUse an older checkpoint, or a copy", path=folder
        )


def incomplete(folder: Path, index: Index) -> list[str]:
    """Return a line for each file of the index that is missing or has another size."""
    problems = []
    for file, num_bytes in index.files.items():
        try:
            found = (folder / file).stat().st_size
        except OSError as error:
            problems.append(f"{folder / file}: missing ({error.strerror})")
        else:
            if found != num_bytes:
                problems.append(f"{folder / file}: {found} bytes instead of {num_bytes}")
    return problems


def read_sums(folder: Path) -> dict[str, str]:
    """Read the checksums by file name. Raises DataError if they are missing or damaged."""
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise DataError(f"{path}: missing ({error.strerror})", path=path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged", path=path) from error
    matches = [_SUM.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) != len(lines) or any(Path(file).name != file for file in sums):
        raise DataError(f"{path}: damaged", path=path)
    return sums


def newest_index(folder: Path) -> Index | None:
    """Return the index of the run's newest checkpoint whose index can be read, or None."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            return Reader(checkpoint).index
        except DataError:  # reported when the checkpoint to continue from is chosen
            continue
    return None
