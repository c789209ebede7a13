"""Writes prepared data to a hidden folder first, and renames it to the output when complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moa_dist.data.manifest import MANIFEST_FILE, SPLITS
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import DataError

_OUR_FILES = re.compile(
    rf"({re.escape(MANIFEST_FILE)}|{re.escape(TOKENIZER_FILE)}|shard-\d+\.tar)\Z"
)


def check_output(output: Path, force: bool) -> None:
    """Raise DataError if the folder exists and must not be replaced."""
    try:
        if not output.exists():
            return
    except OSError as error:
        raise DataError(
            f"{output}: {error.strerror}; choose another --output", path=output
        ) from error
    if not output.is_dir():
        raise DataError(
            f"{output}: exists and is not a folder; choose another --output", path=output
        )
    if _is_mount_point(output):
        raise DataError(
            f"{output}: a file system is mounted here, which cannot be replaced; choose a folder "
            f"in it, such as --output {output / 'data'}",
            path=output,
            key="--output",
        )
    if not any(output.iterdir()):
        return
    if not _made_by_prepare(output):
        # Even --force never deletes files that prepare did not write.
        raise DataError(
            f"{output}: holds files that moa-dist prepare did not write; choose another --output",
            path=output,
            key="--output",
        )
    if not force:
        raise DataError(
            f"{output}: already holds prepared data; use --force to replace it, or choose "
            "another --output",
            path=output,
            key="--force",
        )


def _is_mount_point(folder: Path) -> bool:
    """Return whether a file system is mounted at a folder, or a part of one, such as a volume."""
    mounted = {partition.mountpoint for partition in psutil.disk_partitions(all=True)}
    return str(folder.resolve()) in mounted


def _made_by_prepare(folder: Path) -> bool:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name in SPLITS:
            if not all(_OUR_FILES.match(inner.name) for inner in entry.iterdir()):
                return False
        elif not _OUR_FILES.match(entry.name):
            return False
    return True


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Create a hidden folder next to the output, which is removed if anything goes wrong.

    Where the output is a link, both lie where it leads to.
    """
    try:
        target = output.resolve()
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{output}: cannot be created ({error}); choose another --output", path=output
        ) from error
    try:
        yield partial
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error}); free some space or choose another --output",
            path=output,
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, output: Path) -> None:
    """Rename the finished folder to the output's name."""
    output = output.resolve()
    if output.is_dir() and any(output.iterdir()):
        # The old data stays intact until the new data is complete next to it.
        old = partial.with_name(f"{partial.name}-old")
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
