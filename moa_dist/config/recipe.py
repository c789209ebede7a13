"""Recipes: configurations that come with the package and document themselves.

A recipe begins with a section

    recipe:
      paper: whose model it is, with its arXiv number
      row: the row of the paper's table, or what was changed
      expect: what was published, or what we measured
      ranks: how many the layout is for

which is not part of the run's configuration and is not inherited by files that extend it. Files
without a `name` exist only to be extended.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from moa_dist.config.source import UnreadableError, parse_yaml
from moa_dist.errors import ConfigError, Problem

RECIPE_KEY = "recipe"


class Recipe(BaseModel):
    """The section `recipe` of a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    paper: str
    """Whose model it is, with the arXiv number."""
    row: str
    """The row of the paper's table, or what was changed."""
    expect: str
    """What was published or measured, and which of the two."""
    ranks: PositiveInt
    """Number of ranks that the layout is for: H100 GPUs in bf16, processes on CPUs in fp32."""


def shipped_folder() -> Path:
    """Return the path of `configs/`, which is also part of an installed package."""
    return Path(str(files("moa_dist").joinpath("configs")))


def shipped_recipes() -> dict[str, Path]:
    """Return all recipes' files by name, such as `moeut/244m`."""
    folder = shipped_folder()
    named = {path.relative_to(folder).with_suffix("").as_posix(): path for path in _files(folder)}
    return {name: path for name, path in named.items() if read_recipe(path) is not None}


def read_recipe(path: Path) -> Recipe | None:
    """Read the section `recipe` of a file; None without one. Raises ConfigError if invalid."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path)).data
    except UnreadableError as error:
        raise ConfigError([error.problem], str(path)) from error
    if not isinstance(data, dict) or RECIPE_KEY not in data:
        return None
    try:
        return Recipe.model_validate(data[RECIPE_KEY])
    except ValidationError as error:
        keys = [".".join([RECIPE_KEY, *map(str, each["loc"])]) for each in error.errors()]
        problems = [
            Problem(f"{key}: {each['msg']}", (key,))
            for key, each in zip(keys, error.errors(), strict=True)
        ]
        raise ConfigError(problems, str(path)) from error


def _files(folder: Path) -> list[Path]:
    # Not rglob, which does not enter `configs` where that is a link.
    return sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
