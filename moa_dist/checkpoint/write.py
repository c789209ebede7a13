"""How a checkpoint comes to be on disk: every rank its part, then rank 0 the name.

In `step-00001000.partial` each rank writes its tensors and then `rank-00003.json`, which says
that they are complete. When rank 0 has seen that of every rank, it writes the index and the
checksums, and gives the folder its name: one rename, before which there is no checkpoint and after
which there is a whole one. Ranks speak through files alone, so all of it can run beside training.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Container
from pathlib import Path
from threading import Event

from pydantic import BaseModel, ConfigDict

from moa_dist.checkpoint.format import (
    INDEX_FILE,
    PARTIAL,
    REPLACED,
    SUMS_FILE,
    FileName,
    Index,
    Piece,
    checkpoints,
    parse,
    step_of,
)
from moa_dist.checkpoint.host_copy import Snapshot
from moa_dist.checkpoint.tensor_file import sync_folder, write_file, write_tensors
from moa_dist.errors import DataError

PATIENCE_S = 600.0
"""How long rank 0 waits for the parts of other ranks after it has written its own."""
_POLL_S = 0.02


class RankPart(BaseModel):
    """Content of `rank-00003.json`: what one rank has written."""

    model_config = ConfigDict(extra="forbid")

    file: FileName
    num_bytes: int
    sha256: str
    pieces: list[tuple[str, Piece]]
    """(`parameter/state`, where one of its ranges is)."""


def partial_folder(target: Path) -> Path:
    """Where the checkpoint `target` is put together."""
    return target.with_name(target.name + PARTIAL)


def write_part(partial: Path, rank: int, snapshot: Snapshot) -> None:
    """Write this rank's tensors, then that it has. Raises OSError with the file's name."""
    file = f"rank-{rank:05d}.safetensors"
    written = write_tensors(
        partial / file, [place.spec for place in snapshot.places], [snapshot.values]
    )
    pieces = [
        (place.name, Piece(file, place.spec.key, place.start, place.spec.shape[0]))
        for place in snapshot.places
    ]
    part = RankPart(file=file, num_bytes=written.num_bytes, sha256=written.sha256, pieces=pieces)
    unfinished = partial / f"rank-{rank:05d}.tmp"
    write_file(unfinished, [part.model_dump_json().encode()])
    unfinished.rename(_part_file(partial, rank))


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def publish(
    target: Path,
    world_size: int,
    make_index: Callable[[dict[str, int], dict[str, list[Piece]]], Index],
    cancelled: Event,
    patience_s: float = PATIENCE_S,
) -> None:
    """Wait for the parts of all ranks and make them the checkpoint `target`.

    Args:
        target: the checkpoint's folder to be.
        world_size: ranks that write.
        make_index: the index of these files (bytes by name) and these tensors.
        cancelled: set when a rank is known to have failed.
        patience_s: longest wait for other ranks, seconds.

    Raises:
        OSError: a file could not be written; with its name.
        DataError: parts are missing; says whose.
    """
    partial = partial_folder(target)
    parts = _wait_for_parts(partial, world_size, cancelled, patience_s)
    tensors: dict[str, list[Piece]] = {}
    for part in parts:
        for name, piece in part.pieces:
            tensors.setdefault(name, []).append(piece)
    for pieces in tensors.values():
        pieces.sort(key=lambda piece: piece.start)
    files = {part.file: part.num_bytes for part in parts}
    seal(partial, make_index(files, tensors), {part.file: part.sha256 for part in parts})
    for rank in range(world_size):
        _part_file(partial, rank).unlink()
    move_into_place(partial, target)


def _wait_for_parts(
    partial: Path, world_size: int, cancelled: Event, patience_s: float
) -> list[RankPart]:
    deadline = math.inf  # while this rank writes its own part, no other is late
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not _part_file(partial, rank).exists()]:
        if 0 not in missing:
            deadline = min(deadline, time.monotonic() + patience_s)
        if cancelled.is_set() or time.monotonic() > deadline:
            why = "after another rank failed" if cancelled.is_set() else f"in {patience_s:.0f} s"
            ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DataError(
                f"{partial}: nothing complete from rank {ranks} {why}: look for the error of that "
                "rank, and check that all nodes see the same folder"
            )
        cancelled.wait(_POLL_S)
    paths = [_part_file(partial, rank) for rank in range(world_size)]
    return [parse(RankPart, path.read_bytes(), path) for path in paths]


def seal(folder: Path, index: Index, sha256_of: dict[str, str]) -> None:
    """Write the index and the checksums of all files, of which `sha256_of` knows the tensors'."""
    written = write_file(folder / INDEX_FILE, [index.model_dump_json(indent=1).encode()])
    write_sums(folder, sha256_of | {INDEX_FILE: written.sha256})


def write_sums(folder: Path, sha256_of: dict[str, str]) -> None:
    """Write checksums of files as `sha256sum` does."""
    lines = "".join(f"{sha256_of[file]}  {file}\n" for file in sorted(sha256_of))
    write_file(folder / SUMS_FILE, [lines.encode()])


def move_into_place(partial: Path, target: Path) -> None:
    """Give a complete folder its name, for good; one that has it already is deleted.

    That one is damaged, or of a time that the run has gone back behind. Between the two renames
    neither has the name: `remove_leftovers` then gives it back to the old one.
    """
    sync_folder(partial)
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync_folder(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it stops being one before it stops being whole."""
    doomed = partial_folder(checkpoint)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what jobs that died, or writes that failed, have left unfinished."""
    for path in folder.glob(f"step-*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)
    for path in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)  # one in the way of a new one will be noticed


def prune(
    folder: Path,
    newest: int,
    keep_last: int,
    keep_every: int | None,
    damaged: Container[Path] = (),
) -> None:
    """Delete checkpoints up to step `newest`, but the last ones and every so many steps.

    The `damaged` do not count, and go. Later ones than `newest` are left alone: damaged, or else
    they would have been continued.
    """
    past = [path for path in checkpoints(folder) if step_of(path) <= newest]
    sound = [path for path in past if path not in damaged]
    kept = [path for path in sound if keep_every and step_of(path) % keep_every == 0]
    for path in past:
        if path not in sound[-keep_last:] and path not in kept:
            discard(path)


_IN_THE_WAY = "a file is in the way: remove it, or choose another `output` or `name`"
_REMEDIES = {
    errno.ENOSPC: "free space there, lower checkpoint.keep_last, or choose another `output`; "
    "saving needs room for one checkpoint more than are kept",
    errno.EDQUOT: "free some of your quota there, lower checkpoint.keep_last, or choose another "
    "`output`",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount it for writing, or choose another `output`",
    errno.EACCES: "give this user the right to write there, or choose another `output`",
    errno.EPERM: "give this user the right to write there, or choose another `output`",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENOENT: "check that all nodes see the same folder and that nobody deletes it",
    errno.ESTALE: "check that the network file system is still there",
    errno.EIO: "check the disk",
}


def describe_write_error(error: Exception) -> str:
    """Path, cause and remedy of a failed write, in one line."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or repr(error)
    name = errno.errorcode.get(error.errno, str(error.errno))
    remedy = _REMEDIES.get(error.errno, "check the file system")
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{os.strerror(error.errno)} ({name}): {remedy}"
