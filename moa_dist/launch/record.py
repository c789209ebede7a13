"""What is known of an attempt, as files in its folder that all its hosts may read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START_FILE = "start.json"
"""What agents on other hosts cannot be told by their command line, which shells would mangle."""


@dataclass(frozen=True)
class Start:
    """Content of `start.json`."""

    command: Sequence[str]
    """To be run as every rank."""
    folder: str
    """Where it runs."""
    environment: Mapping[str, str]
    """To be added to that of each host."""
    hosts: Sequence[str]
    """Names by node."""
    port: int
    """Where the supervisor listens, on the host that ssh came from."""
    token: str
    """By which it knows its own agents."""


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
    agent was killed."""
    ended: float | None = None
    """When, in seconds since 1970."""
    orphaned: bool = False
    """Its agent ended it, since nobody watched over the job any more."""
    oom_kills: int | None = None
    """Processes that the kernel killed on that host meanwhile for want of memory, in the agent's
    control group; None where that cannot be read."""

    @property
    def log(self) -> str:
        """Name of the file with its output, beside this record."""
        return f"rank-{self.rank}.log"


def write_record(folder: Path, record: RankRecord) -> None:
    """Replace the rank's record; a reader sees the old or the new one."""
    _replace(folder / f"rank-{record.rank}.json", asdict(record))


def read_records(folder: Path) -> list[RankRecord]:
    """All ranks that were started, in order."""
    found = [RankRecord(**json.loads(path.read_text())) for path in folder.glob("rank-*.json")]
    return sorted(found, key=lambda record: record.rank)


def write_start(folder: Path, start: Start) -> None:
    """For agents to read; for nobody but this user, since it holds the token."""
    _replace(folder / START_FILE, asdict(start), mode=0o600)


def read_start(folder: Path) -> Start:
    """As `write_start` wrote it."""
    return Start(**json.loads((folder / START_FILE).read_text()))


def _replace(path: Path, content: dict[str, Any], mode: int = 0o666) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(json.dumps(content) + "\n")
    os.replace(partial, path)
