"""Finds the files of the input, and names what it leaves out."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from moa_dist.config.data import is_remote
from moa_dist.data.brace_ranges import expand, has_braces, require_all
from moa_dist.data.input_kinds import has_no_suffix, holds_text, list_of_kinds, unknown_kind
from moa_dist.data.left_out import LeftOut
from moa_dist.data.manifest import MANIFEST_FILE
from moa_dist.data.remote_files import remote_files
from moa_dist.data.saved_datasets import (
    SPLITS_FILE,
    dataset_files,
    is_saved_dataset,
    require_one_split,
)
from moa_dist.errors import DataError

_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def find_files(
    inputs: Sequence[str], stdin: BinaryIO | None, spool: Path, left_out: LeftOut | None = None
) -> list[Path]:
    """Resolve files, folders (recursively, sorted, known kinds), URLs of both, and `-` (stdin).

    Each may have braces, such as `shards-{00000..00099}.tar`.

    Args:
        inputs: paths, URLs, or `-`.
        stdin: stream to read `-` from; None for the process's stdin.
        spool: file to copy stdin to, because text is read more than once. Pipes that a shell
            names, such as /dev/fd/63, are copied next to it, and so is each remote file while it
            is read.
        left_out: counts what the folders hold and is not read.

    Raises:
        DataError: an input does not exist, or a folder holds no text file.
    """
    left_out = LeftOut() if left_out is None else left_out
    files: list[Path] = []
    for number, name in enumerate(inputs):
        if name == "-":
            if spool not in files:
                files.append(_copied(stdin or sys.stdin.buffer, spool))
        elif is_remote(name):
            files.extend(remote_files(name, spool.parent, left_out))
        elif name.startswith(_STREAMS) and Path(name).exists() and not Path(name).is_file():
            with Path(name).open("rb") as stream:
                files.append(_copied(stream, spool.with_name(f"{spool.name}-{number}")))
        else:
            for path in _expanded(name):
                files += _files_in(path, left_out, spool) if path.is_dir() else [path]
    return files


def _expanded(name: str) -> list[Path]:
    """Return the files and folders that a name stands for, all of which exist."""
    try:
        paths = [Path(name)]
        if has_braces(name) and not paths[0].exists():
            names = expand(name)
            paths = [Path(each) for each in names]
            require_all(name, names, [str(path) for path in paths if not path.exists()])
        other = next((path for path in paths if not path.is_file() and not path.is_dir()), None)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be opened ({error.strerror}); check --input", path=Path(name)
        ) from error
    if other is not None:
        raise DataError(f"{other}: no such file or folder; check --input", path=other)
    return paths


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
            f"{folder}: no text files in this folder{remains}; {list_of_kinds()}. A file given by "
            "name may have any suffix",
            path=folder,
        )
    return found


def _walk(folder: Path, seen: set[str], left_out: LeftOut, own: set[str]) -> Iterator[Path]:
    """Yield the files to read, following links; `seen` holds the real paths of folders."""
    names = sorted(os.listdir(folder))
    if MANIFEST_FILE in names and "shard-000000.tar" in names:
        left_out.add("folders of prepared shards", folder)
        return
    if is_saved_dataset(names):
        yield from dataset_files(folder, left_out)
        return
    require_one_split(folder, names)
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
    if path.name == SPLITS_FILE:
        return "descriptions of data sets"
    if reason := unknown_kind(path):
        return reason
    if has_no_suffix(path):
        with suppress(OSError), path.open("rb") as raw:
            if holds_text(path, raw):
                return None
        return "of unknown kind"
    return None
