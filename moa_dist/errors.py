"""Errors that a user can fix, split by what has to be fixed.

Every message says what is wrong, where, and what to do. Any other exception that escapes is a
defect of this package. `ExitCode` lists the exit statuses of a rank and of a job's supervisor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """How a rank ended. Killed ranks have none of these; a supervisor reports their signal."""

    DONE = 0
    """The last step was taken and saved."""
    DEFECT = 1
    """An unexpected exception, with a traceback; a supervisor restarts the job."""
    USER = 2
    """Configuration, data or devices are wrong: a restart would fail in the same way."""
    NOT_FINITE = 3
    """The loss or the gradients are not finite, or spike, more often than the policy allows: a
    restart would repeat it."""
    NOT_SAVED = 4
    """A checkpoint could not be written, and the policy is to stop: free space and restart."""
    PREEMPTED = 75
    """On SIGTERM or SIGUSR1 the step was finished and saved. The same command continues."""
    LOST_PEER = 76
    """A rank is gone, silent, or stuck in a step; a supervisor restarts the job."""


class MoaDistError(Exception):
    """Base of all errors that a user can fix; commands print it without a traceback."""


class Source(NamedTuple):
    """Where a value of a configuration was written."""

    name: str
    """A file's path, or the override, as a message shows it."""
    line: int | None = None
    """Line in the file, from 1."""

    def __str__(self) -> str:
        """Return `file:line`, or the override."""
        return self.name if self.line is None else f"{self.name}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a configuration."""

    text: str
    """Says what is wrong and what to do."""
    keys: tuple[str, ...] = ()
    """Dotted paths of the fields that are wrong, or that do not go together."""
    suggestions: Mapping[str, Sequence[object]] = field(default_factory=dict)
    """Per key the values that would work; for an unknown key the keys that may be meant."""
    sources: tuple[Source, ...] = ()
    """Where these keys were written, if that is known."""

    def __str__(self) -> str:
        """Return the text, followed by the sources."""
        return f"{self.text} ({', '.join(map(str, self.sources))})" if self.sources else self.text


class ConfigError(MoaDistError):
    """The configuration is wrong. Carries every problem found, not just the first."""

    def __init__(self, problems: Sequence[Problem | str], source: str = "configuration") -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p) for p in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


class DataError(MoaDistError):
    """Text, shards, manifest, tokenizer or checkpoint files are missing or damaged."""


class ClusterError(MoaDistError):
    """Ranks, devices or their communication do not meet what the run needs."""


class PeerError(ClusterError):
    """Another rank of the job is gone, silent, or did not arrive."""


class MemoryLimitError(MoaDistError):
    """A device, or the host, has too little memory for the run."""


class TrainingError(MoaDistError):
    """Training cannot continue, for example because the loss is no longer finite."""


class SaveError(TrainingError):
    """A checkpoint could not be written: the disk is full, read-only or missing."""


class BadStepError(TrainingError):
    """An optimizer step was rejected on every rank alike, and changed nothing."""
