"""Counts what of the input is not read, so that nothing is dropped in silence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_MOST_NAMED = 5


@dataclass
class LeftOut:
    """Counts what was left out of the input, by reason, with the names of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    """Files, folders or members of archives left out for each reason."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first of them."""

    def add(self, reason: str, path: Path) -> None:
        """Count a file, folder or member."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < _MOST_NAMED:
            names.append(str(path))

    def update(self, other: LeftOut) -> None:
        """Count what another count holds, too."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.names.setdefault(reason, [])
            names.extend(other.names[reason][: _MOST_NAMED - len(names)])

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} {reason} ({', '.join(self.names[reason])}"
            f"{', ...' if count > _MOST_NAMED else ''})"
            for reason, count in self.counts.items()
        )
