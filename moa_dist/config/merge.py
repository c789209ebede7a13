"""One tree out of a file, the files it extends, and overrides from the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_dist.config.schema import closest, kinds_at
from moa_dist.config.source import Document, UnreadableError, parse_yaml
from moa_dist.errors import ConfigError

Tree = dict[str, Any]
_MOST_FILES = 100
_DEEPEST_KEY = 20
"""No field lies nearly as deep."""


@dataclass
class Merged:
    """Plain data, and where each part of it was written."""

    data: Tree = field(default_factory=dict)
    """The whole configuration."""
    sources: dict[str, str] = field(default_factory=dict)
    """Dotted path -> `file:line` or the override that wrote it last."""
    problems: list[str] = field(default_factory=list)
    """Mistakes that did not keep the rest from being read."""
    num_files: int = 0
    """Files read so far; one that several extend counts each time."""

    def merge(self, top: Tree, sources: dict[str, str]) -> None:
        """Lay `top` over the data: mappings merge key by key, all else is replaced."""
        self._merge_into(self.data, top, sources, "")

    def _merge_into(self, base: Tree, top: Tree, sources: dict[str, str], path: str) -> None:
        for key, value in top.items():
            key_path = f"{path}.{key}" if path else key
            old = base.get(key)
            if (
                isinstance(value, dict)
                and isinstance(old, dict)
                and not _switches(old, value, key_path)
            ):
                self._merge_into(old, value, sources, key_path)
            else:
                self._forget(key_path)
                base[key] = value
                self._remember(value, sources, key_path)
            if key_path in sources:
                self.sources[key_path] = sources[key_path]

    def _forget(self, path: str) -> None:
        for known in [p for p in self.sources if p == path or p.startswith(path + ".")]:
            del self.sources[known]

    def _remember(self, value: Any, sources: dict[str, str], path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                self._remember(inner, sources, f"{path}.{key}")
        if path in sources:
            self.sources[path] = sources[path]


def _switches(old: Tree, new: Tree, path: str) -> bool:
    """Whether `new` chooses another kind, whose keys have nothing to do with the old one's.

    A misspelt kind counts as the one it resembles, so that it makes one problem, not many.
    """
    if "kind" not in old or not isinstance(new.get("kind"), str):
        return False
    meant = closest(new["kind"], kinds_at(path))
    return meant is not None and meant != old["kind"]


def read_config_file(path: str | Path) -> Merged:
    """A file laid over the files that it extends; raises `ConfigError` if one cannot be read."""
    merged = Merged()
    unreadable: list[str] = []
    _read_into(merged, os.path.normpath(path), "", [], unreadable)
    if unreadable:
        raise ConfigError(unreadable + merged.problems, str(path))
    return merged


def _read_into(
    merged: Merged, path: str, reader: str, opened: list[str], unreadable: list[str]
) -> None:
    absolute = os.path.abspath(path)
    if absolute in opened:
        chain = " -> ".join(map(os.path.relpath, [*opened[opened.index(absolute) :], absolute]))
        unreadable.append(f"{reader}: `extends` goes in a circle: {chain}; remove one of them")
        return
    merged.num_files += 1
    if merged.num_files > _MOST_FILES:
        if merged.num_files == _MOST_FILES + 1:
            unreadable.append(f"{reader}: `extends` leads to more than {_MOST_FILES} files")
        return
    try:
        document = parse_yaml(Path(path).read_text(encoding="utf-8-sig"), path)
    except UnreadableError as error:
        unreadable.append(str(error))
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        by = f" (extended by {reader})" if reader else ""
        unreadable.append(f"cannot read {path}: {reason}{by}")
        return
    merged.problems += document.problems
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        unreadable.append(f"{path}: must hold keys with values, `name: ...` for example")
        return
    # What the file says of itself is no setting; see `moa_dist.config.recipe`.
    data.pop("recipe", None)
    for base in _bases(merged, document, data.pop("extends", None), path):
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
        _read_into(merged, base_path, path, [*opened, absolute], unreadable)
    merged.merge(data, {key: f"{path}:{line}" for key, line in document.lines.items()})


def _bases(merged: Merged, document: Document, extends: Any, path: str) -> list[str]:
    names = [] if extends is None else extends if isinstance(extends, list) else [extends]
    if all(isinstance(name, str) for name in names):
        return names
    merged.problems.append(
        f"{path}:{document.lines['extends']}: `extends` must be a file name or a list of them"
    )
    return []


def apply_overrides(merged: Merged, overrides: Sequence[str]) -> None:
    """Lay `key.path=value` arguments over the data.

    They are merged among themselves first, so their order matters only where two set the
    same key: `model.attention.kind=dense` never erases another override.
    """
    together = Merged()
    for override in overrides:
        name = f"override `{override}`"
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            merged.problems.append(f"{name}: write it as `key.path=value`")
            continue
        if len(keys) > _DEEPEST_KEY:
            merged.problems.append(f"{name}: no key has {len(keys)} parts")
            continue
        try:
            document = parse_yaml(text, name)
        except UnreadableError as error:
            merged.problems.append(str(error))
            continue
        merged.problems += document.problems
        blocked = _blocked(together.data, keys) or _blocked(merged.data, keys)
        if blocked:
            merged.problems.append(
                f"{name}: `{blocked}` is a single value and has no keys below it"
            )
            continue
        tree: Any = document.data
        for key in reversed(keys):
            tree = {key: tree}
        paths = [".".join(keys[: i + 1]) for i in range(len(keys))]
        paths += [f"{paths[-1]}.{inner}" for inner in document.lines]
        together.merge(tree, dict.fromkeys(paths, name))
    merged.merge(together.data, together.sources)


def _blocked(data: Tree, keys: list[str]) -> str | None:
    """The part of the path that already holds a plain value; null may become a section."""
    node: Any = data
    for depth, key in enumerate(keys[:-1], start=1):
        node = node.get(key)
        if node is None:
            return None
        if not isinstance(node, dict):
            return ".".join(keys[:depth])
    return None
