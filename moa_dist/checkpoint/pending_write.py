"""A checkpoint that is being written: one thread per rank, and on rank 0 a second one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from threading import Event
from typing import NamedTuple

from pydantic import JsonValue

from moa_dist.checkpoint.background import Background
from moa_dist.checkpoint.note import Note
from moa_dist.checkpoint.write import describe_write_error, partial_folder


class WriteProgress(IntEnum):
    """How far a write is; the largest of all ranks' is that of the checkpoint."""

    DONE = 0
    RUNNING = 1
    FAILED = 2


class Identity(NamedTuple):
    """Distinguishes a checkpoint from others of the same run."""

    step: int
    """Steps taken."""
    samples: int
    """Sequences consumed."""
    state: dict[str, JsonValue]
    """What else the run keeps."""


class Outcome(NamedTuple):
    """What became of a write."""

    error: str | None
    """Why there is no checkpoint, if there is none."""
    seconds: float
    """How long it took."""
    notes: list[Note]
    """What else happened."""


@dataclass(frozen=True)
class PendingWrite:
    """A checkpoint that is being written."""

    target: Path
    identity: Identity
    part: Background
    """Writes what this rank owns."""
    publication: Background | None
    """On rank 0, waits for all parts and makes them a checkpoint."""
    canceled: Event
    """Set when a part will never come."""
    notes: list[Note] = field(default_factory=list)
    """What else it met, to be reported with its success."""

    def progress(self) -> WriteProgress:
        """How far it is, as far as this rank knows."""
        threads = [t for t in (self.part, self.publication) if t is not None]
        if any(t.failed() for t in threads):
            return WriteProgress.FAILED
        ended = all(t.ended() for t in threads)
        return WriteProgress.DONE if ended else WriteProgress.RUNNING

    def outcome(self) -> Outcome:
        """Wait for the checkpoint; called on rank 0."""
        assert self.publication is not None
        error = self.publication.wait()
        if error is None:
            return Outcome(None, self.publication.seconds, self.notes)
        # Gives the room back; if even that fails, the next save says so.
        shutil.rmtree(partial_folder(self.target), ignore_errors=True)
        return Outcome(describe_write_error(error), self.publication.seconds, [])
