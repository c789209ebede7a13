"""Plain data -> typed configuration, collecting every problem instead of stopping at the first.

Each section is validated field by field with pydantic's own constraints. What survives makes
a partial configuration on which the cross-field checks run, so that a typo hides nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moa_dist.config import schema
from moa_dist.config.checks import check_fields
from moa_dist.config.problem import Problem
from moa_dist.config.run import Config
from moa_dist.config.schema import closest
from moa_dist.config.section import Kind, Section

AnySection = TypeVar("AnySection", bound=Section)


class _UnusableError(Exception):
    """A value that cannot be used at all."""

    def __init__(self, path: str, text: str, cite: str | None = None) -> None:
        self.problem = Problem(text, (path if cite is None else cite,))


def validate(data: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The configuration, or None and everything that is wrong with it."""
    problems: list[Problem] = []
    partial = _read_section(Config, data, "", problems)
    problems += check_fields(partial, partial=bool(problems))
    if problems:
        return None, problems
    # JSON since pydantic's strict mode then takes a list for a tuple, but no "3" for a 3.
    return Config.model_validate_json(json.dumps(data), strict=True), []


def _read_section(
    section: type[AnySection], data: dict[str, Any], path: str, problems: list[Problem]
) -> AnySection:
    """The section with the fields that are right; unusable ones are absent attributes."""
    values = _report_unknown_keys(section, data, path, problems)
    known: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        key_path = f"{path}.{name}" if path else name
        if name not in values and not info.is_required():
            known[name] = info.get_default()
            continue
        try:
            if name not in values:
                text = f"`{key_path}` is missing; it must be {schema.describe(info)}"
                raise _UnusableError(key_path, text, cite=path)
            known[name] = _read_value(info, values[name], key_path, problems)
        except _UnusableError as unusable:
            problems.append(unusable.problem)
    part = section.model_construct(None, **known)
    # model_construct fills in defaults, which a check would take for what the user wants.
    for name in section.model_fields.keys() - known.keys():
        part.__dict__.pop(name, None)
    return part


def _read_value(info: FieldInfo, value: Any, path: str, problems: list[Problem]) -> Any:
    sections = schema.section_types(info)
    if not sections:
        return _read_plain(info, value, path)
    if value is None and schema.allows_null(info):
        return None
    if not isinstance(value, dict):
        raise _wrong(info, value, path)
    family = schema.family(info)
    if family is None:
        return _read_section(sections[0], value, path, problems)
    chosen = _choose_kind(family, value, path, problems)
    value = {**value, "kind": schema.kind_name(chosen)}
    return _read_section(chosen, value, path, problems)


def _read_plain(info: FieldInfo, value: Any, path: str) -> Any:
    annotation: Any = info.annotation
    for constraint in info.metadata:
        annotation = Annotated[annotation, constraint]
    adapter = TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError:
        raise _wrong(info, value, path) from None


def _wrong(info: FieldInfo, value: Any, path: str) -> _UnusableError:
    text = f"`{path}` is {_show(value)}; it must be {schema.describe(info)}"
    if isinstance(value, dict) and not schema.section_types(info):
        text = f"`{path}` has keys below it; it must be {schema.describe(info)}"
    return _UnusableError(path, text)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _choose_kind(
    family: type[Kind], data: dict[str, Any], path: str, problems: list[Problem]
) -> type[Section]:
    by_kind = family.kinds
    allowed = ", ".join(by_kind)
    given = data.get("kind", family.model_fields["kind"].get_default())
    if given is PydanticUndefined:
        raise _UnusableError(path, f"`{path}.kind` is missing; it must be one of {allowed}")
    if isinstance(given, str) and given in by_kind:
        return by_kind[given]
    text = f"`{path}.kind` is {_show(given)}; it must be one of {allowed}"
    guess = closest(given, by_kind) if isinstance(given, str) else None
    if guess is None:
        raise _UnusableError(f"{path}.kind", text)
    # Going on with the likeliest kind finds the problems below it as well.
    problems.append(Problem(f"{text}; did you mean {guess}?", (f"{path}.kind",)))
    return by_kind[guess]


def _report_unknown_keys(
    section: type[Section], data: dict[str, Any], path: str, problems: list[Problem]
) -> dict[str, Any]:
    """The data with known keys only; a typo's value goes to the key it resembles, if free."""
    known = section.model_fields.keys()
    values = {key: value for key, value in data.items() if key in known}
    for key in [k for k in data if k not in known]:
        key_path = f"{path}.{key}" if path else key
        elsewhere = _elsewhere(section, key, path)
        guess = closest(key, known)
        if elsewhere:
            hint = elsewhere
        elif guess:
            hint = f"did you mean `{guess}`?"
            values.setdefault(guess, data[key])
        else:
            hint = f"known here: {', '.join(known)}"
        problems.append(Problem(f"unknown key `{key_path}`; {hint}", (key_path,)))
    return values


def _elsewhere(section: type[Section], key: str, path: str) -> str | None:
    """Where else in the schema the key exists, nearest places first."""
    places: dict[str, tuple[str, ...]] = {}
    for field in schema.walk():
        if field.path.rpartition(".")[2] == key:
            places[field.path] = places.get(field.path, ()) + field.kinds
    key_path = f"{path}.{key}" if path else key
    if key_path in places:
        own = schema.kind_name(section)
        return f"kind {own} has none, only kind {' and '.join(places[key_path])}"

    def common_parents(place: str) -> int:
        pairs = zip(place.split("."), key_path.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)

    nearest = sorted(places, key=common_parents, reverse=True)[:2]
    return f"it belongs at {' or '.join(f'`{p}`' for p in nearest)}" if nearest else None
