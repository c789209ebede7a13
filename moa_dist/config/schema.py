"""View the schema as data: its sections, kinds and fields, described in plain words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from moa_dist.config.run import Config
from moa_dist.config.section import Kind, Section


class SchemaField(NamedTuple):
    """A field or section that a configuration can set."""

    path: str
    """Dotted path."""
    kinds: tuple[str, ...]
    """Kinds of the enclosing section that have this field; empty when it is always there."""
    info: FieldInfo
    """Pydantic's description of the field."""


def section_types(info: FieldInfo) -> tuple[type[Section], ...]:
    """Return the sections that the field may hold, one per kind; none for a plain value."""
    chosen_by_kind = family(info)
    if chosen_by_kind is not None:
        return tuple(chosen_by_kind.choices().values())
    return tuple(t for t in _types(info) if issubclass(t, Section))


def family(info: FieldInfo) -> type[Kind] | None:
    """Return the family of kinds that the field may hold; None for a field without a choice."""
    return next((t for t in _types(info) if issubclass(t, Kind)), None)


def item_section(info: FieldInfo) -> type[Section] | None:
    """Return the section of which the field may hold a list; None if it may not."""
    for t in _alternatives(info.annotation):
        if get_origin(t) is tuple and isinstance(get_args(t)[0], type):
            item = get_args(t)[0]
            if issubclass(item, Section):
                return cast(type[Section], item)
    return None


def kind_name(section: type[Section]) -> str:
    """Return the value of `kind` that chooses this section."""
    return str(section.model_fields["kind"].default)


def allows_null(info: FieldInfo) -> bool:
    """Whether the field may be null."""
    return type(None) in _alternatives(info.annotation)


def kinds_at(path: str) -> list[str]:
    """Return the kinds that a section at a dotted path can have; none if it has no choice."""
    choices = [section_types(f.info) for f in walk() if f.path == path]
    return [kind_name(c) for sections in choices if len(sections) > 1 for c in sections]


def closest(name: str, candidates: Collection[str]) -> str | None:
    """Return the candidate that a misspelled name most resembles; None if none comes near."""
    return next(iter(difflib.get_close_matches(name.lower(), candidates, n=1)), None)


def walk(
    section: type[Section] = Config, path: str = "", kinds: tuple[str, ...] = ()
) -> Iterator[SchemaField]:
    """Yield every section and field, parents first; one that kinds document alike comes once.

    A section chosen by `kind` has no entry for `kind` itself: its own entry lists the kinds. Fields
    of the sections in a list have `[]` after the list's path.
    """
    for name, info in section.model_fields.items():
        key_path = f"{path}.{name}" if path else name
        choices = section_types(info)
        yield SchemaField(key_path, kinds, info)
        if family(info) is not None:
            yield from _walk_kinds(choices, key_path, kinds)
        elif choices:
            yield from walk(choices[0], key_path, kinds)
        elif item := item_section(info):
            yield from walk(item, f"{key_path}[]", kinds)


def _walk_kinds(
    choices: tuple[type[Section], ...], path: str, outer: tuple[str, ...]
) -> Iterator[SchemaField]:
    if len(choices) == 1:  # nothing to choose from
        fields = walk(choices[0], path, outer)
        yield from (field for field in fields if field.path != f"{path}.kind")
        return
    found: dict[tuple[str, str | None], SchemaField] = {}
    for choice in choices:
        for field in walk(choice, path, (kind_name(choice),)):
            if field.path == f"{path}.kind":
                continue
            key = (field.path, field.info.description)
            earlier = found.setdefault(key, field)
            # The kinds of a section within this one do not add up.
            if earlier is not field and field.kinds == (kind_name(choice),):
                found[key] = earlier._replace(kinds=earlier.kinds + field.kinds)
    everywhere = tuple(kind_name(choice) for choice in choices)
    for field in found.values():
        yield field._replace(kinds=outer) if field.kinds == everywhere else field


def describe(info: FieldInfo) -> str:
    """Describe the values allowed, such as `an integer of at least 1, or null`."""
    choices = section_types(info)
    if len(choices) > 1:
        text = "a section, its kind one of " + ", ".join(kind_name(c) for c in choices)
    elif choices:
        text = "a section"
    else:
        text = _describe_value(info.annotation, tuple(info.metadata))
    return f"{text}, or null" if allows_null(info) else text


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; any other annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(a for member in get_args(annotation) for a in _alternatives(member))
    return (annotation,)


def _types(info: FieldInfo) -> tuple[type, ...]:
    """Return the classes among what the field may hold, whatever annotates them."""
    alternatives = _alternatives(info.annotation)
    bare = (get_args(a)[0] if get_origin(a) is Annotated else a for a in alternatives)
    return tuple(t for t in bare if isinstance(t, type))


def _describe_value(annotation: Any, constraints: tuple[Any, ...]) -> str:
    members = [a for a in _alternatives(annotation) if a is not type(None)]
    if len(members) > 1:
        return ", or ".join(_describe_value(member, constraints) for member in members)
    (value,) = members
    if get_origin(value) is Annotated:
        value, *inner = get_args(value)
        constraints += tuple(inner)
    if get_origin(value) is Literal:
        return "one of " + ", ".join(map(str, get_args(value)))
    if get_origin(value) is tuple:
        first, *rest = get_args(value)
        if isinstance(first, type) and issubclass(first, Section):
            required = [name for name, info in first.model_fields.items() if info.is_required()]
            return f"a list of sections with {' and '.join(required)}"
        if get_origin(first) is Literal:
            return "a list of " + ", ".join(map(str, get_args(first)))
        noun = "texts" if first is str else "numbers"
        if get_origin(first) is tuple:
            noun = f"lists of {len(get_args(first))} numbers"
        return f"a list of {noun}" if rest == [Ellipsis] else f"a list of {1 + len(rest)} {noun}"
    if value is bool:
        return "true or false"
    if value is str:
        return "text"
    return _describe_number("an integer" if value is int else "a number", value, constraints)


def _describe_number(noun: str, value: type, constraints: tuple[Any, ...]) -> str:
    bounds = []
    for c in constraints:
        if isinstance(c, annotated_types.Gt):
            bounds.append("at least 1" if value is int and c.gt == 0 else f"above {c.gt}")
        if isinstance(c, annotated_types.Ge):
            bounds.append(f"at least {c.ge}")
        if isinstance(c, annotated_types.Lt):
            bounds.append(f"below {c.lt}")
        if isinstance(c, annotated_types.Le):
            bounds.append(f"at most {c.le}")
    text = " and ".join(bounds)
    return f"{noun} {'of ' if text.startswith('at ') else ''}{text}".strip()
