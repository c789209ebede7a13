"""The result of a check. A check that itself fails is a finding too, and does not stop others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from moa_dist.errors import MoaDistError

Status = Literal["ok", "note", "FAULT"]


@dataclass(frozen=True)
class Finding:
    """One entry of the report."""

    check: str
    """Name of the check, in one or two words."""
    status: Status
    """`FAULT` would make a run fail or crawl; `note` is information that may matter."""
    text: str
    """What was found, and where."""
    remedy: str = ""
    """What to do about it; empty if nothing."""
    seconds: tuple[float, ...] = ()
    """Measured times by rank, if the check measures speed."""
    subject: str = ""
    """The package, version, device, folder or port concerned, where a check covers several."""
    ranks: tuple[int, ...] = ()
    """The ranks concerned, where a check compares ranks."""
    hosts: tuple[str, ...] = ()
    """The hosts concerned, where a check compares ranks or hosts."""

    @property
    def is_fault(self) -> bool:
        """Whether the command must exit with status 1."""
        return self.status == "FAULT"

    def __str__(self) -> str:
        """Format the finding as one line, and the remedy as a second one."""
        line = f"{self.status:<6}{self.check:<16} {self.text}"
        return f"{line}\n{'':<23}-> {self.remedy}" if self.remedy else line


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check and return its findings; an exception becomes the last of them."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        findings.append(failed(name, error))
    return findings


def failed(name: str, error: Exception) -> Finding:
    """Turn the exception that ended a check into a finding."""
    if isinstance(error, MoaDistError):  # written for users, including the remedy
        return Finding(name, "FAULT", str(error))
    text = f"the check failed: {type(error).__name__}: {error}"
    is_missing = isinstance(error, ImportError)
    return Finding(name, "FAULT", text, "install moa-dist into this Python" if is_missing else "")
