"""What a check says. A check that fails itself is a finding too, and stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from moa_dist.errors import MoaDistError

Status = Literal["ok", "note", "FAULT"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    """What was looked at, in a word or two."""
    status: Status
    """`FAULT` is what a run would fail or crawl by; `note` what a reader should know."""
    text: str
    """What was found, and where."""
    remedy: str = ""
    """What to do about it; empty if nothing."""
    seconds: tuple[float, ...] = ()
    """Measured times by rank, if the check is one of speed."""

    @property
    def is_fault(self) -> bool:
        """Whether the command must end with status 1."""
        return self.status == "FAULT"

    def __str__(self) -> str:
        """A line, and one for what to do."""
        line = f"{self.status:<6}{self.check:<16} {self.text}"
        return f"{line}\n{'':<23}-> {self.remedy}" if self.remedy else line


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of `check`; an exception becomes the last of them."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        findings.append(failed(name, error))
    return findings


def failed(name: str, error: Exception) -> Finding:
    """The finding that a check could not be made."""
    if isinstance(error, MoaDistError):  # written for people, remedy included
        return Finding(name, "FAULT", str(error))
    text = f"could not be checked: {type(error).__name__}: {error}"
    is_missing = isinstance(error, ImportError)
    return Finding(name, "FAULT", text, "install moa-dist into this Python" if is_missing else "")
