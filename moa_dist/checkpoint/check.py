"""Checks a checkpoint's files against their checksums; no engine is needed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moa_dist.checkpoint.format import INDEX_FILE, SUMS_FILE, Index, Reader, checkpoints
from moa_dist.errors import DataError

_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[DataError]:
    """Return the problems of a checkpoint; empty if it is valid.

    Each names its file, and as its key `file` if that is missing, `bytes` or `sha256` if that is
    not as it was written, or the entry at fault. Reads every file. Ranks may share the work: each
    reads every `world_size`-th file.
    """
    try:
        index = Reader(folder).index
        sums = read_sums(folder)
    except DataError as error:
        return [error]
    problems = incomplete(folder, index)
    for file in sorted({*index.files, INDEX_FILE} - sums.keys()):
        path = folder / SUMS_FILE
        problems.append(DataError(f"{path}: lacks {file}", path=path, key=file))
    if problems:
        return problems
    return list(altered(folder, {file: sums[file] for file in sorted(sums)[rank::world_size]}))


def altered(folder: Path, sums: Mapping[str, str]) -> Iterator[DataError]:
    """Yield a problem for each file that is not as it was written."""
    for path, expected in ((folder / file, sha256) for file, sha256 in sums.items()):
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            yield DataError(f"{path}: cannot be read: {error.strerror}", path=path, key="file")
        else:
            if found != expected:
                yield DataError(f"{path}: altered since it was written", path=path, key="sha256")


def require_valid(folder: Path) -> None:
    """Raise DataError if a checkpoint is damaged."""
    problems = damage(folder)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(
            f"{folder} is damaged:{lines}\nUse an older checkpoint, or a copy",
            path=folder,
            causes=problems,
        )


def incomplete(folder: Path, index: Index) -> list[DataError]:
    """Return a problem for each file of the index that is missing or has another size."""
    problems = []
    for path, num_bytes in ((folder / file, size) for file, size in index.files.items()):
        try:
            found = path.stat().st_size
        except OSError as error:
            text = f"{path}: missing ({error.strerror})"
            problems.append(DataError(text, path=path, key="file"))
        else:
            if found != num_bytes:
                text = f"{path}: {found} bytes instead of {num_bytes}"
                problems.append(DataError(text, path=path, key="bytes"))
    return problems


def read_sums(folder: Path) -> dict[str, str]:
    """Read the checksums by file name. Raises DataError if they are missing or damaged."""
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise DataError(f"{path}: missing ({error.strerror})", path=path, key="file") from error
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
