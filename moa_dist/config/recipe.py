"""Recipes: the configurations that come with the package, and what each says of itself.

A configuration that is one begins with a section

    recipe:
      paper: whose model it is, with its arXiv number
      row: of which table, or what was changed
      expect: what was published, or what we saw

which is not part of the run's configuration and is not passed on to files that extend it. Files
without a `name` of their own only hold what others extend.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moa_dist.config.source import UnreadableError, parse_yaml
from moa_dist.errors import ConfigError

RECIPE_KEY = "recipe"


class Recipe(BaseModel):
    """What a configuration says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    paper: str
    """Whose model it is, with the arXiv number."""
    row: str
    """Of which table of the paper, or what was changed."""
    expect: str
    """What was published or observed, and of which kind that is."""


def shipped_folder() -> Path:
    """`configs/`, which is part of an installed package, too."""
    return Path(str(files("moa_dist").joinpath("configs")))


def shipped_recipes() -> dict[str, Path]:
    """Files by the name of their recipe, such as `moeut/244m`."""
    folder = shipped_folder()
    named = {path.relative_to(folder).with_suffix("").as_posix(): path for path in _files(folder)}
    return {name: path for name, path in named.items() if read_recipe(path) is not None}


def read_recipe(path: Path) -> Recipe | None:
    """The `recipe` section of a file; None if it has none. Raises ConfigError if it is wrong."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path)).data
    except UnreadableError as error:
        raise ConfigError([str(error)], str(path)) from error
    if not isinstance(data, dict) or RECIPE_KEY not in data:
        return None
    try:
        return Recipe.model_validate(data[RECIPE_KEY])
    except ValidationError as error:
        problems = [
            ".".join([RECIPE_KEY, *map(str, each["loc"])]) + f": {each['msg']}"
            for each in error.errors()
        ]
        raise ConfigError(problems, str(path)) from error


def _files(folder: Path) -> list[Path]:
    # Not rglob, which does not enter `configs` where that is a link.
    return sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
