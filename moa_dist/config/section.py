"""Sections, of which the configuration is made; some of them are chosen by their `kind`."""

from __future__ import annotations

import json
import os.path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationInfo,
)
from pydantic import model_validator as validator

FolderPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path; unlike the words of a command, it has met no shell that knows what `~` is."""


class _MayChange:
    """Marks a field, or all fields of a section, that a resumed run may change freely."""


MAY_CHANGE = _MayChange()
"""Put in a field's `Annotated`. Unmarked fields make another model or another run: a resumed run
changes them only if `checkpoint.allow_changes` names them."""


class InvalidFieldError(Exception):
    """A field was read for which the configuration holds no valid value."""


class Section(BaseModel):
    """A part of the configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    if not TYPE_CHECKING:  # else every attribute would exist in the eyes of a type checker

        def __getattr__(self, name: str) -> Any:
            """Raise InvalidFieldError for a field that `validate` has left out as invalid.

            Other missing attributes raise AttributeError, so a check's own mistakes are not taken
            for the user's.
            """
            if name in type(self).model_fields:
                raise InvalidFieldError(name)
            return super().__getattr__(name)

    def changed(self, **fields: Any) -> Self:
        """Return a validated copy with other values in some fields."""
        return type(self).model_validate(self.model_copy(update=fields).model_dump())


def _with_tuples(value: Any) -> Any:
    """Replace lists, which is what JSON has, by tuples, which is what fields are."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


class Kind(Section):
    """A section chosen by its `kind` among the kinds of one family.

    A family, such as all kinds of attention, is a subclass with its own `kinds`; a subclass of it
    is listed there once it is defined. Fields are declared as `SerializeAsAny[Family]`.
    """

    kind: str
    """Names this kind."""
    kinds: ClassVar[dict[str, type[Kind]]]
    """All kinds of the family by name. A family whose own `kind` has a default is itself a kind,
    and is meant where none is named."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name = cls.model_fields["kind"].default
        if isinstance(name, str):
            cls.kinds[name] = cls

    @classmethod
    def choices(cls) -> dict[str, type[Self]]:
        """Return the kinds that a field declared as this class may hold, by name."""
        return {name: kind for name, kind in cls.kinds.items() if issubclass(kind, cls)}

    @validator(mode="wrap")
    @classmethod
    def _choose(
        cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Validate by the kind that is named, where the field is declared as the family."""
        if not isinstance(value, dict):
            return handler(value)
        name = value.get("kind", cls.model_fields["kind"].default)
        chosen = cls.choices().get(name) if isinstance(name, str) else None
        if chosen is None:
            raise ValueError(f"kind {name!r} is not one of {', '.join(cls.choices())}")
        if chosen is cls:
            return handler(_with_tuples(value) if info.mode == "json" else value)
        if info.mode == "json":  # strict, as JSON has its own rules for what counts as a tuple
            return chosen.model_validate_json(json.dumps(value), strict=True)
        return chosen.model_validate(value)
