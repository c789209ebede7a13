"""Turn plain data into a typed configuration, or report every problem, not just the first.

Each section is validated field by field with pydantic's own constraints. The valid fields make a
partial configuration on which the cross-field checks run, so a typo hides no other problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moa_dist.config import schema
from moa_dist.config.checks import check_fields
from moa_dist.config.run import Config
from moa_dist.config.schema import closest
from moa_dist.config.section import Kind, Section
from moa_dist.errors import Problem

AnySection = TypeVar("AnySection", bound=Section)


class _UnusableError(Exception):
    """A field has no value that could be used; carries the problem."""

    def __init__(self, path: str, text: str) -> None:
        self.problem = Problem(text, (path,))


def validate(data: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Return the configuration, or None and everything that is wrong with it."""
    problems: list[Problem] = []
    partial = _read_section(Config, data, "", problems)
    problems += check_fields(partial)
    if problems:
        return None, problems
    # In JSON, pydantic's strict mode accepts a list for a tuple, but still no "3" for a 3.
    return Config.model_validate_json(json.dumps(data), strict=True), []


def _read_section(
    section: type[AnySection], data: dict[str, Any], path: str, problems: list[Problem]
) -> AnySection:
    """Return the section with its valid fields; reading others raises InvalidFieldError."""
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
                raise _UnusableError(key_path, text)
            known[name] = _read_value(info, values[name], key_path, problems)
        except _UnusableError as unusable:
            problems.append(unusable.problem)
    part = section.model_construct(None, **known)
    # model_construct fills in defaults, which a check would take for the user's choice.
    for name in section.model_fields.keys() - known.keys():
        part.__dict__.pop(name, None)
    return part


def _read_value(info: FieldInfo, value: Any, path: str, problems: list[Problem]) -> Any:
    sections = schema.section_types(info)
    if not sections:
        item = schema.item_section(info)
        if item is not None and isinstance(value, list):
            return tuple(_read_items(info, item, value, path, problems))
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


def _read_items(
    info: FieldInfo, item: type[Section], values: list[Any], path: str, problems: list[Problem]
) -> Iterator[Section]:
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise _wrong(info, values, path)
        yield _read_section(item, value, f"{path}.{index}", problems)


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
    by_kind = family.choices()
    allowed = ", ".join(by_kind)
    given = data.get("kind", family.model_fields["kind"].get_default())
    if given is PydanticUndefined:
        raise _UnusableError(
            f"{path}.kind", f"`{path}.kind` is missing; it must be one of {allowed}"
        )
    if isinstance(given, str) and given in by_kind:
        return by_kind[given]
    text = f"`{path}.kind` is {_show(given)}; it must be one of {allowed}"
    guess = closest(given, by_kind) if isinstance(given, str) else None
    if guess is None:
        raise _UnusableError(f"{path}.kind", text)
    # Continuing with the likeliest kind finds the problems below it as well.
    key = f"{path}.kind"
    problems.append(Problem(f"{text}; did you mean {guess}?", (key,), {key: (guess,)}))
    return by_kind[guess]


def _report_unknown_keys(
    section: type[Section], data: dict[str, Any], path: str, problems: list[Problem]
) -> dict[str, Any]:
    """Return known keys only; the value of a typo goes to the key it resembles, if not set."""
    known = section.model_fields.keys()
    values = {key: value for key, value in data.items() if key in known}
    for key in [k for k in data if k not in known]:
        key_path = f"{path}.{key}" if path else key
        kinds, places = _elsewhere(key, path)
        guess = closest(key, known)
        if kinds:
            own = schema.kind_name(section)
            hint = f"kind {own} does not have it, only kind {' and '.join(kinds)}"
        elif places:
            hint = f"it belongs at {' or '.join(f'`{p}`' for p in places)}"
        elif guess:
            hint = f"did you mean `{guess}`?"
            places = [f"{path}.{guess}" if path else guess]
            values.setdefault(guess, data[key])
        else:
            hint = f"known keys here: {', '.join(known)}"
        text = f"unknown key `{key_path}`; {hint}"
        problems.append(Problem(text, (key_path,), {key_path: tuple(kinds) or tuple(places)}))
    return values


def _elsewhere(key: str, path: str) -> tuple[tuple[str, ...], list[str]]:
    """Find the key elsewhere in the schema: kinds that have it here, and the nearest places."""
    places: dict[str, tuple[str, ...]] = {}
    for field in schema.walk():
        if field.path.rpartition(".")[2] == key:
            places[field.path] = places.get(field.path, ()) + field.kinds
    key_path = f"{path}.{key}" if path else key

    def common_parents(place: str) -> int:
        pairs = zip(place.split("."), key_path.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)

    return places.get(key_path, ()), sorted(places, key=common_parents, reverse=True)[:2]
