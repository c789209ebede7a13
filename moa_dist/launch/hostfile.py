"""Reads DeepSpeed's hostfile, which lists the hosts of a job as lines `NAME slots=RANKS`.

It is validated here because DeepSpeed only warns about a missing file and then trains on this
machine alone, and because it passes names to `pdsh`, which interprets some of them as patterns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moa_dist.errors import ClusterError

_LINE = re.compile(r"(\S+)\s+slots=(\d{1,6})")
_NAME = re.compile(r"(?:\w[\w.-]*@)?\w[\w.-]*")


@dataclass(frozen=True)
class Host:
    """One host of a job."""

    name: str
    """Name or address that `ssh` accepts."""
    slots: int
    """Number of ranks to start there."""


@dataclass(frozen=True)
class HostfileProblem:
    """Something wrong in a hostfile."""

    kind: Literal["unreadable", "empty", "syntax", "name", "slots", "duplicate"]
    """What is wrong: the file itself, or in a line its syntax, its name or its slots."""
    line: int | None
    """Number of the line, from 1; None if it concerns the whole file."""
    text: str
    """Explanation, with what to write instead."""


class HostfileError(ClusterError):
    """A hostfile is missing or wrong. Carries every problem found, not just the first."""

    def __init__(self, path: Path, problems: Sequence[HostfileProblem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  - {path}{'' if p.line is None else f':{p.line}'}: {p.text}" for p in problems]
        super().__init__("\n".join([f"hostfile: {count}", *lines]))


def read_hostfile(path: Path) -> list[Host]:
    """Return all hosts in order; the first one becomes node 0.

    Raises:
        HostfileError: The file cannot be read, or some of its lines are wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        text = f"cannot be read: {reason}; write one line per host, such as `node-1 slots=8`"
        raise HostfileError(path, [HostfileProblem("unreadable", None, text)]) from error
    hosts: dict[str, Host] = {}
    problems: list[HostfileProblem] = []
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].strip()
        if not words:
            continue
        parsed = _parse(words, number, hosts)
        if isinstance(parsed, HostfileProblem):
            problems.append(parsed)
        else:
            hosts[parsed.name] = parsed
    if not hosts and not problems:
        text = "lists no host; write one line per host, such as `node-1 slots=8`"
        problems.append(HostfileProblem("empty", None, text))
    if problems:
        raise HostfileError(path, problems)
    return list(hosts.values())


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write a hostfile for DeepSpeed."""
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def _parse(words: str, number: int, earlier: dict[str, Host]) -> Host | HostfileProblem:
    match = _LINE.fullmatch(words)
    if match is None:
        text = f"`{words}` is not `NAME slots=RANKS`, such as `{words.split()[0]} slots=8`"
        return HostfileProblem("syntax", number, text)
    name, slots = match[1], int(match[2])
    if not _NAME.fullmatch(name):
        text = f"`{name}` is not a host name or IPv4 address; write one line per host"
        return HostfileProblem("name", number, text)
    if slots == 0:
        text = f"`{name}` has no slots; remove the line, or give the number of ranks to start"
        return HostfileProblem("slots", number, text)
    if name in earlier:
        text = f"`{name}` is listed twice; write one line with all its slots"
        return HostfileProblem("duplicate", number, text)
    return Host(name, slots)
