"""Files in an attempt's folder, shared by all its hosts: what to run, and how each rank ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

START_FILE = "start.json"
"""Instructions for agents on other hosts, where shells would mangle a command line."""


@dataclass(frozen=True)
class Start:
    """Content of `start.json`."""

    command: Sequence[str]
    """Command to run as every rank."""
    folder: str
    """Working folder of the command."""
    environment: Mapping[str, str]
    """Variables to add to the environment of each host."""
    hosts: Sequence[str]
    """Names of hosts by node."""
    port: int
    """Port of the supervisor, on the host that ssh connected from."""
    key: str = field(repr=False)
    """Secret of this attempt, as hexadecimal digits, by which the supervisor knows its agents."""


@dataclass(frozen=True)
class RankRecord:
    """Content of `rank-N.json`."""

    rank: int
    """0 ... W - 1."""
    host: str
    """Name of the machine it runs on."""
    pid: int
    """Process ID on that machine."""
    status: int | None = None
    """Exit code, or minus the signal that killed it; None while it runs, and forever if its agent
    was killed."""
    ended: float | None = None
    """When it ended, in seconds since 1970."""
    orphaned: bool = False
    """Whether its agent ended it because the supervisor or the launcher was gone."""
    oom_kills: int | None = None
    """Processes in the agent's control group that the kernel killed for lack of memory while the
    rank ran; None where that cannot be read."""

    @property
    def log(self) -> str:
        """Name of the file with the rank's output, in the same folder."""
        return f"rank-{self.rank}.log"


def write_record(folder: Path, record: RankRecord) -> None:
    """Replace the rank's record atomically."""
    _replace(folder / f"rank-{record.rank}.json", asdict(record))


def read_records(folder: Path) -> list[RankRecord]:
    """Return the records of all ranks that were started, in order."""
    found = [RankRecord(**json.loads(path.read_text())) for path in folder.glob("rank-*.json")]
    return sorted(found, key=lambda record: record.rank)


def write_start(folder: Path, start: Start) -> None:
    """Write the instructions for agents, readable only by this user because of the key."""
    _replace(folder / START_FILE, asdict(start), mode=0o600)


def read_start(folder: Path) -> Start:
    """Read the instructions written by `write_start`."""
    return Start(**json.loads((folder / START_FILE).read_text()))


def _replace(path: Path, content: dict[str, Any], mode: int = 0o666) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(json.dumps(content) + "\n")
    os.replace(partial, path)
