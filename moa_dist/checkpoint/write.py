"""Writes a checkpoint: each rank writes its part, then rank 0 renames the folder.

In `step-00001000.partial`, each rank writes its tensors and then `rank-00003.json`, which marks
them complete. Once rank 0 has seen this file of every rank, it writes the index and the checksums
and renames the folder: the checkpoint is complete as soon as its name exists. Ranks communicate
through files only, so all of this can run in the background during training.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Container
from contextlib import suppress
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

IndexMaker = Callable[[dict[str, int], dict[str, list[Piece]]], Index]
"""Makes an index of bytes by file and pieces by tensor."""
PATIENCE_S = 600.0
"""Seconds that rank 0 waits for the parts of other ranks after writing its own."""
_POLL_S = 0.02


class RankPart(BaseModel):
    """Holds the content of `rank-00003.json`: what one rank has written."""

    model_config = ConfigDict(extra="forbid")

    file: FileName
    num_bytes: int
    sha256: str
    pieces: list[tuple[str, Piece]]
    """Pairs of `parameter/state` and the location of one of its ranges."""


def partial_folder(target: Path) -> Path:
    """Return the folder in which the checkpoint `target` is assembled."""
    return target.with_name(target.name + PARTIAL)


def write_part(partial: Path, rank: int, snapshot: Snapshot) -> None:
    """Write this rank's tensors, then mark them complete. Raises OSError with the file's name."""
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
    make_index: IndexMaker,
    canceled: Event,
    patience_s: float = PATIENCE_S,
) -> None:
    """Wait for the parts of all ranks and turn them into the checkpoint `target`.

    Args:
        target: folder of the new checkpoint.
        world_size: number of ranks that write.
        make_index: builds the index from file sizes by name and ranges by tensor.
        canceled: set when a rank is known to have failed.
        patience_s: maximum wait for other ranks, in seconds.

    Raises:
        OSError: a file could not be written; has its name.
        DataError: parts are missing; names their ranks.
    """
    partial = partial_folder(target)
    parts = _wait_for_parts(partial, world_size, canceled, patience_s)
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
    partial: Path, world_size: int, canceled: Event, patience_s: float
) -> list[RankPart]:
    deadline = math.inf  # no rank is late while this rank still writes its own part
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not _part_file(partial, rank).exists()]:
        if 0 not in missing:
            deadline = min(deadline, time.monotonic() + patience_s)
        if canceled.is_set() or time.monotonic() > deadline:
            why = "after another rank failed" if canceled.is_set() else f"in {patience_s:.0f} s"
            ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DataError(
                f"{partial}: no complete part from rank {ranks} {why}; look for the error of that "
                "rank, and check that all nodes see the same folder",
                path=partial,
                key=f"rank {ranks}",
            )
        canceled.wait(_POLL_S)
    paths = [_part_file(partial, rank) for rank in range(world_size)]
    return [parse(RankPart, path.read_bytes(), path) for path in paths]


def seal(folder: Path, index: Index, sha256_of: dict[str, str]) -> None:
    """Write the index and all checksums; `sha256_of` holds those of the tensor files."""
    written = write_file(folder / INDEX_FILE, [index.model_dump_json(indent=1).encode()])
    write_sums(folder, sha256_of | {INDEX_FILE: written.sha256})


def write_sums(folder: Path, sha256_of: dict[str, str]) -> None:
    """Write checksums in the format of `sha256sum`."""
    lines = "".join(f"{sha256_of[file]}  {file}\n" for file in sorted(sha256_of))
    write_file(folder / SUMS_FILE, [lines.encode()])


def move_into_place(partial: Path, target: Path) -> None:
    """Rename a complete folder to `target` durably; delete a checkpoint that has this name.

    Such a checkpoint is damaged, or the run has rolled back to before it. If the job dies between
    the two renames, `remove_leftovers` restores the old checkpoint.
    """
    sync_folder(partial)
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync_folder(target.parent)
    if replaced.exists():
        _delete(replaced)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name before any of its files."""
    doomed = partial_folder(checkpoint)
    checkpoint.rename(doomed)
    _delete(doomed)


def _delete(folder: Path) -> None:
    """Delete a folder, or a link to one: what a user moved to another disk stays there."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what dead jobs or failed writes left unfinished."""
    for path in folder.glob(f"step-*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if target.exists():
            _delete(path)
        else:
            path.rename(target)
    for path in folder.glob(f"step-*{PARTIAL}"):
        with suppress(OSError):  # creating a folder of this name would fail
            _delete(path)


def prune(
    folder: Path,
    newest: int,
    keep_last: int,
    keep_every: int | None,
    damaged: Container[Path] = (),
) -> None:
    """Delete checkpoints up to step `newest`, except the last ones and every `keep_every` steps.

    The `damaged` ones do not count and are deleted. Checkpoints later than `newest` are kept; the
    run did not continue from them because they are damaged.
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
    "saving needs space for one more checkpoint than are kept",
    errno.EDQUOT: "free some of your quota there, lower checkpoint.keep_last, or choose another "
    "`output`",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount it for writing, or choose another `output`",
    errno.EACCES: "give this user write permission there, or choose another `output`",
    errno.EPERM: "give this user write permission there, or choose another `output`",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENOENT: "check that all nodes see the same folder and that nobody deletes it",
    errno.ESTALE: "check that the network file system is still mounted",
    errno.EIO: "check the disk",
}


def describe_write_error(error: Exception) -> str:
    """Describe path, cause and remedy of a failed write, in one line."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or repr(error)
    name = errno.errorcode.get(error.errno, str(error.errno))
    remedy = _REMEDIES.get(error.errno, "check the file system")
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{os.strerror(error.errno)} ({name}): {remedy}"
