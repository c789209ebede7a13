"""What a resumed run changes in its configuration, and which of it needs permission.

A field marked `MAY_CHANGE` in the schema changes neither the model nor what it learns from. Every
other one, including those that are yet to be added, must be named in `checkpoint.allow_changes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from moa_dist.config.run import Config
from moa_dist.config.schema import closest, walk
from moa_dist.config.section import MAY_CHANGE, Kind, Section
from moa_dist.errors import Problem


class Change(NamedTuple):
    """A setting that differs between a checkpoint and the run that continues from it."""

    path: str
    """Dotted path of the field; of a section that is of another kind, the section's."""
    before: JsonValue
    """Value in the checkpoint's configuration."""
    after: JsonValue
    """Value in the run's configuration."""

    def __str__(self) -> str:
        """Describe the change, such as `train.steps 40 -> 80`."""
        before, after = (v if isinstance(v, str) else json.dumps(v) for v in self[1:])
        return f"{self.path} {before} -> {after}"


class Changes(NamedTuple):
    """All settings that differ, in the order of the schema."""

    free: list[Change]
    """Those of fields marked `MAY_CHANGE`."""
    deciding: list[Change]
    """Those that make another model or another run."""

    def under(self, section: str) -> list[Change]:
        """Those that make another run and lie at or below this path."""
        return [change for change in self.deciding if covers(section, change.path)]


def changes(before: Config, after: Config) -> Changes:
    """Compare the configurations of a checkpoint and of the run that continues from it."""
    found = Changes([], [])
    for change, is_free in _compare(before, after, "", is_free=False):
        (found.free if is_free else found.deciding).append(change)
    return found


def refused(deciding: Sequence[Change], config: Config) -> list[Change]:
    """Return the changes that `checkpoint.allow_changes` does not name."""
    allowed = config.checkpoint.allow_changes
    return [c for c in deciding if not any(covers(section, c.path) for section in allowed)]


def covers(section: str, path: str) -> bool:
    """Whether `path` is this section or field, or lies below it."""
    return path == section or path.startswith(f"{section}.")


def unknown_permissions(config: Config) -> Iterator[Problem]:
    """Check that `checkpoint.allow_changes` names fields that exist."""
    known = {field.path for field in walk()}
    for name in config.checkpoint.allow_changes:
        if name not in known:
            guess = closest(name, known)
            hint = f"; did you mean `{guess}`?" if guess else ""
            text = f"`checkpoint.allow_changes` names `{name}`, which is no field{hint}"
            meant = {"checkpoint.allow_changes": [guess]} if guess else {}
            yield Problem(text, ("checkpoint.allow_changes",), meant)


def _compare(
    before: Section, after: Section, path: str, *, is_free: bool
) -> Iterator[tuple[Change, bool]]:
    for name, info in type(after).model_fields.items():
        key_path = f"{path}.{name}" if path else name
        old, new = getattr(before, name), getattr(after, name)
        free = is_free or MAY_CHANGE in info.metadata
        if old == new:
            continue
        if isinstance(old, Section) and type(old) is type(new):
            yield from _compare(old, new, key_path, is_free=free)
        elif isinstance(old, Kind) and isinstance(new, Kind):
            yield Change(key_path, old.kind, new.kind), free
        else:
            yield Change(key_path, *(_plain(s, name) for s in (before, after))), free


def _plain(section: Section, name: str) -> JsonValue:
    value: JsonValue = section.model_dump(mode="json", include={name})[name]
    return value
