"""Errors meant for a person, split by who can mend them.

Every message says what is wrong, where, and what to do. Anything else that
escapes is a defect of this package.
"""

from __future__ import annotations


class MoaDistError(Exception):
    """Base of all errors that a user can mend; commands print it without a traceback."""


class ConfigError(MoaDistError):
    """The configuration is wrong. Carries every problem found, not just the first."""

    def __init__(self, problems: list[str], source: str = "configuration") -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


class DataError(MoaDistError):
    """Text, shards, manifest, tokenizer or checkpoint files are missing or damaged."""


class ClusterError(MoaDistError):
    """Ranks, devices or their communication are not as the run needs them."""


class TrainingError(MoaDistError):
    """Training cannot go on, such as a loss that is no longer finite."""


class SaveError(TrainingError):
    """A checkpoint could not be written: the disk is full, read-only or gone."""
