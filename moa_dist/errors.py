"""Errors meant for a person, split by who can mend them.

Every message says what is wrong, where, and what to do. Anything else that
escapes is a defect of this package. `ExitCode` is what a rank, and the supervisor of a job, end
with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """How a rank ended. Killed ranks have none of these; a supervisor names their signal."""

    DONE = 0
    """The last step was taken and saved."""
    DEFECT = 1
    """Anything unforeseen, with a traceback; a supervisor tries again."""
    USER = 2
    """Configuration, data or devices are wrong: trying again would change nothing."""
    NOT_FINITE = 3
    """The loss or the gradients are not finite, or spike, more often than the policy allows:
    trying again would repeat it."""
    NOT_SAVED = 4
    """A checkpoint could not be written, and the policy is to stop: make room, start again."""
    PREEMPTED = 75
    """SIGTERM or SIGUSR1 came: the step was finished and saved. Start the same command again."""
    LOST_PEER = 76
    """A rank is gone, silent, or stuck in a step; a supervisor tries again."""


class MoaDistError(Exception):
    """Base of all errors that a user can mend; commands print it without a traceback."""


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
    """Ranks, devices or their communication are not as the run needs them."""


class PeerError(ClusterError):
    """Another rank of the job is gone, silent, or does not come."""


class MemoryLimitError(MoaDistError):
    """A device, or the host, holds too little for the run."""


class TrainingError(MoaDistError):
    """Training cannot go on, such as a loss that is no longer finite."""


class SaveError(TrainingError):
    """A checkpoint could not be written: the disk is full, read-only or gone."""


class BadStepError(TrainingError):
    """An optimizer step was refused, the same on every rank; nothing has changed by it."""
