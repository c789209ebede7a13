"""What is known of a rank of one attempt, as a file that its keeper writes and all may read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RankRecord:
    """Content of `rank-N.json`."""

    rank: int
    """0 ... W - 1."""
    host: str
    """Where it runs."""
    pid: int
    """Its process there."""
    status: int | None = None
    """Exit code, or minus the signal that killed it; None while it runs, and for ever if its
    keeper was killed."""
    ended: float | None = None
    """When, in seconds since 1970."""
    orphaned: bool = False
    """Its keeper ended it, since nobody watched over the job any more."""

    @property
    def log(self) -> str:
        """Name of the file with its output, beside this record."""
        return f"rank-{self.rank}.log"


def write_record(folder: Path, record: RankRecord) -> None:
    """Replace the rank's record; a reader sees the old or the new one."""
    path = folder / f"rank-{record.rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record)) + "\n")
    os.replace(partial, path)


def read_records(folder: Path) -> list[RankRecord]:
    """All ranks that were started, in order."""
    found = [RankRecord(**json.loads(path.read_text())) for path in folder.glob("rank-*.json")]
    return sorted(found, key=lambda record: record.rank)
