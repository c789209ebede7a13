"""What became of checkpoints, in a line for people and a kind for programs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class NoteKind(StrEnum):
    """What a note reports."""

    SAVED = "saved"
    """A checkpoint was written."""
    FAILED = "failed"
    """A checkpoint could not be written."""
    STAYS = "stays"
    """An old checkpoint could not be deleted."""
    DAMAGED = "damaged"
    """A checkpoint was passed over because it is damaged."""
    RESUMED = "resumed"
    """The run goes on from a checkpoint."""
    CHANGED = "changed"
    """That checkpoint was saved by other sources or packages."""


@dataclass(frozen=True)
class Note:
    """One event."""

    kind: NoteKind
    """What happened."""
    checkpoint: Path
    """The checkpoint's folder; of an old one that stays, the new one that should replace it."""
    text: str
    """The event in one line, which names the checkpoint where it matters."""

    def __str__(self) -> str:
        """Return the line."""
        return self.text
