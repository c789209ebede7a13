"""The hosts of a job, as DeepSpeed's hostfile lists them: `NAME slots=RANKS`, one a line.

Read here first because DeepSpeed only warns of a file that is missing and then trains on this
machine alone, and hands names to `pdsh`, which takes some for patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_dist.errors import ClusterError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_NAME = re.compile(r"(?:\w[\w.-]*@)?\w[\w.-]*")


@dataclass(frozen=True)
class Host:
    """A line of the file."""

    name: str
    """By which `ssh` reaches it."""
    slots: int
    """Ranks to start there."""


def read_hostfile(path: Path) -> list[Host]:
    """All hosts in order; node 0 comes first.

    Raises:
        ClusterError: with everything that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ClusterError(
            f"hostfile {path} cannot be read: {reason}; it has a line for each host, such as "
            "`node-1 slots=8`"
        ) from error
    hosts: dict[str, Host] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].strip()
        if not words:
            continue
        parts = words.split()[0], hosts
        problem = next(_problems(words, *parts), None)
        if problem is not None:
            problems.append(f"  - {path}:{number}: {problem}")
            continue
        match = _LINE.fullmatch(words)
        assert match is not None
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts and not problems:
        problems.append(f"  - {path}: no host; write a line for each, such as `node-1 slots=8`")
    if problems:
        raise ClusterError("\n".join([f"hostfile: {len(problems)} wrong", *problems]))
    return list(hosts.values())


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """As DeepSpeed reads it."""
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def _problems(line: str, name: str, before: dict[str, Host]) -> Iterator[str]:
    match = _LINE.fullmatch(line)
    if match is None:
        yield f"`{line}` is not `NAME slots=RANKS`; write `{name} slots=8` for 8 ranks there"
    elif not _NAME.fullmatch(name):
        yield f"`{name}` is no host name or IPv4 address; write one line for each host"
    elif int(match[2]) == 0:
        yield f"no slots on `{name}`; leave the host out, or start a rank per GPU there"
    elif name in before:
        yield f"`{name}` comes a second time; write one line with all its slots"
