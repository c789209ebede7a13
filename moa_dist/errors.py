"""Errors that a user can fix, grouped by cause, and the exit codes of ranks and supervisors.

Every message says what is wrong, where, and what to do. Any other exception that escapes is a
defect of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import NamedTuple


class ExitCode(IntEnum):
    """How a rank ended. A rank that was killed has none of these; a supervisor names the signal."""

    DONE = 0
    """The last step was taken and saved."""
    DEFECT = 1
    """An unexpected error, with a traceback, or a crash; a supervisor restarts the job."""
    USER = 2
    """The configuration, the data or the devices are wrong: a restart would not help."""
    NOT_FINITE = 3
    """The loss or the gradients were not finite, or spiked, more often than the policy allows: a
    restart would repeat it."""
    NOT_SAVED = 4
    """A checkpoint could not be written and the policy is to stop: free disk space, then start
    again."""
    PREEMPTED = 75
    """Ctrl-C, SIGTERM or SIGUSR1 arrived, or the launcher is gone: the step was finished and saved.
    Run the same command to continue."""
    LOST_PEER = 76
    """A rank was killed, is gone, silent, or stuck in a step; a supervisor restarts the job."""


class MoaDistError(Exception):
    """Base class of all errors that a user can fix; commands print them without a traceback."""


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
    """The configuration is invalid. Carries every problem found, not just the first."""

    def __init__(self, problems: Sequence[Problem | str], source: str = "configuration") -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p) for p in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


class DataError(MoaDistError):
    """A text, shard, manifest, tokenizer or checkpoint file is missing or damaged."""

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        line: int | None = None,
        key: str | None = None,
        causes: Sequence[DataError] = (),
    ) -> None:
        super().__init__(message)
        self.path = path
        """The file or folder at fault."""
        self.line = line
        """The line at fault in that file, counted from 1."""
        self.key = key
        """The option, configuration key, field, tensor or archive member at fault. A file that
        contradicts its manifest has the manifest's field, such as `sha256`."""
        self.causes = tuple(causes)
        """The separate problems, if this error reports several."""


class PathError(MoaDistError):
    """The system refuses a path: a name too long, a folder that may not be written."""


@contextmanager
def refused_paths_named() -> Iterator[None]:
    """Turn an OSError about a path into a PathError, in whatever part of a command it occurs.

    OSErrors without a path, such as that of a closed pipe, pass.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise PathError(f"{error.filename}: {error.strerror}") from error


class RunInUseError(MoaDistError):
    """Another job writes to the run's folder."""


class ClusterError(MoaDistError):
    """The ranks, devices or network do not meet the needs of the run."""


class PeerErrorKind(StrEnum):
    """What happened to the rank that a PeerError is about."""

    ABSENT = "absent"
    """It did not join the job, or cannot be reached."""
    DEAD = "dead"
    """Its process ended without reporting a reason."""
    SILENT = "silent"
    """It sends no heartbeats: it is stopped, or cut off."""
    FAILED = "failed"
    """It ended with an error, which it reported."""
    STUCK = "stuck"
    """It is alive, but a collective or a step takes longer than allowed."""


class PeerError(ClusterError):
    """Another rank of the job is gone, silent, stuck, or did not join."""

    def __init__(self, message: str, kind: PeerErrorKind) -> None:
        super().__init__(message)
        self.kind = kind
        """What happened to that rank."""


class MemoryLimitError(MoaDistError):
    """A device, or the host, has too little memory for the run."""


class TrainingError(MoaDistError):
    """Training cannot continue, for example because the loss is no longer finite."""


class StoppedError(MoaDistError):
    """A signal has ended work that a later run of the same command continues."""


class SaveError(TrainingError):
    """A checkpoint could not be written: the disk is full, read-only or missing."""


class BadStepReason(StrEnum):
    """Why an optimizer step is rejected."""

    LOSS = "loss"
    """The loss, or one of its terms, is not finite."""
    GRAD_NORM = "grad_norm"
    """The loss is finite, but the norm of the gradient is not."""
    SPIKE = "spike"
    """The loss is above its limit."""


class BadStepError(TrainingError):
    """An optimizer step was rejected on every rank; it left the state of training unchanged."""

    def __init__(self, message: str, reason: BadStepReason, values: Mapping[str, float]) -> None:
        super().__init__(message)
        self.reason = reason
        """What was wrong."""
        self.values = values
        """The numbers at fault by name: terms of the loss, or the gradient norm, that are not
        finite; or the loss and its limit."""
