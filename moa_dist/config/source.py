"""Reading YAML text into plain data, remembering on which line each key stands.

Stricter than PyYAML's own loader: duplicate keys are problems, only plain values exist (no
tags, no dates), and numbers such as `1e-4` are numbers, which YAML 1.1 calls text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


_MOST_VALUES = 10_000
"""Far more than any configuration has; a few lines of nested aliases can spell billions."""


class _Loader(yaml.SafeLoader):
    """Knows null, booleans and decimal numbers; all else is text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class UnreadableError(Exception):
    """The text is not YAML that a configuration may hold; the message says where and why."""


@dataclass
class Document:
    """What one piece of YAML says."""

    data: Any
    """Plain data: dict with text keys, list, str, int, float, bool or None."""
    lines: dict[str, int] = field(default_factory=dict)
    """Line of each mapping key, by dotted path."""
    problems: list[str] = field(default_factory=list)
    """Duplicate keys; the last one counts."""


def parse_yaml(text: str, name: str) -> Document:
    """Parse a file's text or an override's value; `name` stands for it in messages.

    Raises `UnreadableError`.
    """
    document = Document(None)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            document.data = _Converter(document, name).convert(node, "")
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise UnreadableError(f"{name}{line}: not valid YAML: {reason}") from None
    except yaml.YAMLError as error:
        raise UnreadableError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise UnreadableError(f"{name}: nested too deeply to be a configuration") from None
    return document


class _Converter:
    """Turns PyYAML's nodes into plain data."""

    def __init__(self, document: Document, name: str) -> None:
        self.document = document
        self.name = name
        self.open: list[yaml.Node] = []
        self.num_values = 0

    def convert(self, node: yaml.Node, path: str) -> Any:
        if any(node is outer for outer in self.open):
            raise self.unreadable(node, "an alias contains itself")
        self.num_values += 1
        if self.num_values > _MOST_VALUES:
            raise self.unreadable(
                node, f"more than {_MOST_VALUES} values, aliases counted: no configuration"
            )
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
                return dict(self.items(node, path))
            if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
                return [self.convert(item, path) for item in node.value]
            return self.scalar(node)
        finally:
            self.open.pop()

    def items(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, Any]]:
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.convert(key_node, path)
            if not isinstance(key, str):
                raise self.unreadable(key_node, f"the key {key!r} must be text")
            line = key_node.start_mark.line + 1
            key_path = f"{path}.{key}" if path else key
            if key in first_line:
                self.document.problems.append(
                    f"{self.name}:{line}: `{key_path}` stands twice, first on line "
                    f"{first_line[key]}; remove one"
                )
            first_line.setdefault(key, line)
            self.document.lines[key_path] = line
            yield key, self.convert(value_node, key_path)

    def scalar(self, node: yaml.Node) -> Any:
        text = node.value
        try:
            match node.tag.removeprefix("tag:yaml.org,2002:"):
                case "str":
                    text.encode()  # half a surrogate pair is not text
                    return text
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return _whole(text)
                case "float":
                    return _number(text)
        except ValueError:
            raise self.unreadable(node, f"cannot use the value {text[:40]!a}") from None
        raise self.unreadable(node, f"the tag {node.tag} is not allowed")

    def unreadable(self, node: yaml.Node, reason: str) -> UnreadableError:
        return UnreadableError(f"{self.name}:{node.start_mark.line + 1}: {reason}")


def _number(text: str) -> int | float:
    """`1e5` becomes a whole number, so that counts may be written so; `1e-4` and `5.` do not."""
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    whole = "e" in text.lower() and value.is_integer() and abs(value) < 2**63
    return int(value) if whole else value


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError("no setting needs more than 64 bits")
    return value
