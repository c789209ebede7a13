"""Merge a file, the files that it extends and command-line overrides into one tree."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_dist.config.schema import closest, kinds_at
from moa_dist.config.source import UnreadableError, parse_yaml
from moa_dist.errors import ConfigError, Problem, Source

Tree = dict[str, Any]
Sources = Mapping[str, Source]
_MOST_FILES = 100
_DEEPEST_KEY = 20
"""Keys in a path; no field is nearly as deep."""


@dataclass
class Merged:
    """Plain data, and where each part of it was written."""

    data: Tree = field(default_factory=dict)
    """The whole configuration."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Dotted path -> what wrote it last."""
    problems: list[Problem] = field(default_factory=list)
    """Mistakes after which the rest could still be read."""

    def merge(self, top: Tree, sources: Sources) -> None:
        """Lay `top` over the data: mappings merge key by key, anything else is replaced."""
        self._merge_into(self.data, top, sources, "")

    def _merge_into(self, base: Tree, top: Tree, sources: Sources, path: str) -> None:
        for key, value in top.items():
            key_path = f"{path}.{key}" if path else key
            old = base.get(key)
            if (
                isinstance(value, dict)
                and isinstance(old, dict)
                and not _switches(old, value, key_path)
            ):
                self._merge_into(old, value, sources, key_path)
                written = {key_path} & sources.keys()
            else:
                base[key] = value
                for replaced in _at_or_below(key_path, self.sources):
                    del self.sources[replaced]
                written = _at_or_below(key_path, sources)
            self.sources |= {known: sources[known] for known in written}


def _at_or_below(path: str, sources: Sources) -> set[str]:
    return {known for known in sources if known == path or known.startswith(path + ".")}


def _switches(old: Tree, new: Tree, path: str) -> bool:
    """Whether `new` chooses another kind, whose keys have nothing to do with the old one's.

    A misspelled kind counts as the one it resembles, so that it causes one problem, not many.
    """
    if "kind" not in old or not isinstance(new.get("kind"), str):
        return False
    meant = closest(new["kind"], kinds_at(path))
    return meant is not None and meant != old["kind"]


def read_config_file(path: str | Path) -> Merged:
    """Read a file and lay it over the files that it extends.

    Raises ConfigError if one of them cannot be read.
    """
    reader = _Reader()
    reader.read(os.path.normpath(path), "", [])
    if reader.unreadable:
        raise ConfigError(reader.unreadable + reader.merged.problems, str(path))
    return reader.merged


class _Reader:
    """Reads files that extend each other, depth first."""

    def __init__(self) -> None:
        self.merged = Merged()
        self.unreadable: list[Problem] = []
        self.num_files = 0
        """Files read so far; one that several extend counts each time."""

    def read(self, path: str, extended_by: str, opened: list[str]) -> None:
        """Read one file, after the files that it extends."""
        absolute = os.path.abspath(path)
        if absolute in opened:
            names = map(os.path.relpath, [*opened[opened.index(absolute) :], absolute])
            circle = f"`extends` forms a cycle: {' -> '.join(names)}; remove one of them"
            self.cannot_read(circle, extended_by)
            return
        self.num_files += 1
        if self.num_files > _MOST_FILES:
            if self.num_files == _MOST_FILES + 1:
                self.cannot_read(f"`extends` leads to more than {_MOST_FILES} files", extended_by)
            return
        try:
            document = parse_yaml(Path(path).read_text(encoding="utf-8-sig"), path)
        except UnreadableError as error:
            self.unreadable.append(error.problem)
            return
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
            by = f", extended by {extended_by}" if extended_by else ""
            self.cannot_read(f"cannot read the file{by}: {reason}", path)
            return
        self.merged.problems += document.problems
        data = {} if document.data is None else document.data
        if not isinstance(data, dict):
            self.cannot_read("a configuration must be a mapping of keys to values", path)
            return
        # What the file says about itself is not a setting; see `moa_dist.config.recipe`.
        data.pop("recipe", None)
        for base in self.bases(data.pop("extends", None), document.sources):
            base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
            self.read(base_path, path, [*opened, absolute])
        self.merged.merge(data, document.sources)

    def bases(self, extends: Any, sources: Sources) -> list[str]:
        names = [] if extends is None else extends if isinstance(extends, list) else [extends]
        if all(isinstance(name, str) for name in names):
            return names
        text = "`extends` must be a file name or a list of file names"
        problem = Problem(text, ("extends",), sources=(sources["extends"],))
        self.merged.problems.append(problem)
        return []

    def cannot_read(self, text: str, path: str) -> None:
        self.unreadable.append(Problem(text, sources=(Source(path),)))


def apply_overrides(merged: Merged, overrides: Sequence[str]) -> None:
    """Lay `key.path=value` arguments over the data.

    They are merged among themselves first, so their order matters only where two set the
    same key: `model.attention.kind=dense` never erases another override.
    """
    together = Merged()
    for override in overrides:
        try:
            _add_override(merged, together, override)
        except UnreadableError as error:
            merged.problems.append(error.problem)
    merged.merge(together.data, together.sources)


def _add_override(merged: Merged, together: Merged, override: str) -> None:
    source = Source(f"override `{override}`")
    path, equals, text = override.partition("=")
    path = path.strip()
    keys = path.split(".")
    if not equals or not all(keys):
        raise UnreadableError("not of the form `key.path=value`", source)
    if len(keys) > _DEEPEST_KEY:
        raise UnreadableError(f"no field is {len(keys)} keys deep", source)
    document = parse_yaml(text, source.name, path)
    merged.problems += document.problems
    blocked = _blocked(together.data, keys) or _blocked(merged.data, keys)
    if blocked:
        text = f"`{blocked}` is a single value and has no keys below it"
        merged.problems.append(Problem(text, (blocked,), sources=(source,)))
        return
    tree: Any = document.data
    for key in reversed(keys):
        tree = {key: tree}
    written = [".".join(keys[: i + 1]) for i in range(len(keys))]
    together.merge(tree, dict.fromkeys([*written, *document.sources], source))


def _blocked(data: Tree, keys: list[str]) -> str | None:
    """Return the part of the path that already holds a plain value; null may become a section."""
    node: Any = data
    for depth, key in enumerate(keys[:-1], start=1):
        node = node.get(key)
        if node is None:
            return None
        if not isinstance(node, dict):
            return ".".join(keys[:depth])
    return None
