"""Parse YAML into plain data, and record the line of each key.

Stricter than PyYAML's own loader: duplicate keys are problems, only plain values are allowed (no
tags, no dates), and numbers such as `1e-4` are numbers, which YAML 1.1 takes for text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from moa_dist.errors import Problem, Source

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


_MOST_VALUES = 10_000
"""Far more than any configuration has; a few lines of nested aliases can expand to billions."""


class _Loader(yaml.SafeLoader):
    """Recognizes null, booleans and decimal numbers; everything else is text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class UnreadableError(Exception):
    """The text is not YAML that a configuration may hold; carries the problem."""

    def __init__(self, text: str, source: Source) -> None:
        self.problem = Problem(text, sources=(source,))
        super().__init__(str(self.problem))


@dataclass
class Document:
    """The contents of one piece of YAML."""

    data: Any
    """Plain data: dict with text keys, list, str, int, float, bool or None."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Source of each mapping key, and of each mapping in a list, by dotted path."""
    problems: list[Problem] = field(default_factory=list)
    """Duplicate keys; the last one wins."""


def parse_yaml(text: str, name: str, override_of: str = "") -> Document:
    """Parse a file's text, or the value that an override gives to the path `override_of`.

    Messages call it `name`; they give lines of a file, not of an override. Raises UnreadableError.
    """
    document = Document(None)
    converter = _Converter(document, name, has_lines=not override_of)
    try:
        if override_of and _has_comment(text):
            raise UnreadableError(
                "` #` begins a comment in YAML and would cut the value short; put the value in "
                f"quotes: '{override_of}=\"...\"'",
                converter.source(None),
            )
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            document.data = converter.convert(node, override_of)
    except yaml.MarkedYAMLError as error:
        source = converter.source(error.problem_mark)
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise UnreadableError(f"not valid YAML: {reason}", source) from None
    except yaml.YAMLError as error:
        raise UnreadableError(f"not valid YAML: {error}", converter.source(None)) from None
    except RecursionError:
        text = "nested too deeply for a configuration"
        raise UnreadableError(text, converter.source(None)) from None
    return document


def _has_comment(text: str) -> bool:
    """Whether a comment lies between two tokens."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return False


class _Converter:
    """Converts PyYAML's nodes to plain data."""

    def __init__(self, document: Document, name: str, *, has_lines: bool) -> None:
        self.document = document
        self.name = name
        self.has_lines = has_lines
        self.open: list[yaml.Node] = []
        self.num_values = 0

    def convert(self, node: yaml.Node, path: str) -> Any:
        if any(node is outer for outer in self.open):
            raise self.unreadable(node, "an alias contains itself")
        self.num_values += 1
        if self.num_values > _MOST_VALUES:
            raise self.unreadable(
                node, f"more than {_MOST_VALUES} values after expanding aliases; remove some"
            )
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
                return dict(self.items(node, path))
            if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
                return list(self.elements(node, path))
            return self.scalar(node)
        finally:
            self.open.pop()

    def items(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, Any]]:
        first: dict[str, Source] = {}
        for key_node, value_node in node.value:
            key = self.convert(key_node, path)
            if not isinstance(key, str):
                raise self.unreadable(key_node, f"the key {key!r} is not text; put it in quotes")
            source = self.source(key_node.start_mark)
            key_path = f"{path}.{key}" if path else key
            if key in first:
                text = f"`{key_path}` is set twice; remove one"
                both = tuple(dict.fromkeys((first[key], source)))
                self.document.problems.append(Problem(text, (key_path,), sources=both))
            first.setdefault(key, source)
            self.document.sources[key_path] = source
            yield key, self.convert(value_node, key_path)

    def elements(self, node: yaml.Node, path: str) -> Iterator[Any]:
        for index, item in enumerate(node.value):
            key_path = f"{path}.{index}"
            if isinstance(item, yaml.MappingNode):
                self.document.sources[key_path] = self.source(item.start_mark)
            yield self.convert(item, key_path)

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
            raise self.unreadable(node, f"invalid value {text[:40]!a}") from None
        raise self.unreadable(node, f"the tag {node.tag} is not allowed")

    def unreadable(self, node: yaml.Node, reason: str) -> UnreadableError:
        return UnreadableError(reason, self.source(node.start_mark))

    def source(self, mark: yaml.Mark | None) -> Source:
        return Source(self.name, mark.line + 1 if mark and self.has_lines else None)


def _number(text: str) -> int | float:
    """Convert to an integer where an exponent gives one (`1e5`), else to a float (`1e-4`, `5.`)."""
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    whole = "e" in text.lower() and value.is_integer() and abs(value) < 2**63
    return int(value) if whole else value


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError("more than 64 bits")
    return value
