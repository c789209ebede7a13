"""From a path and `key=value` overrides to a checked configuration, and back to YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moa_dist.config.merge import Merged, apply_overrides, read_config_file
from moa_dist.config.problem import Problem
from moa_dist.config.run import Config
from moa_dist.config.validate import validate
from moa_dist.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with what it extends, lay overrides over it, and check everything.

    `extends:` names a file, or a list of files of which later ones win, relative to the file
    it stands in. Mappings merge key by key; choosing another `kind` of attention or FFN
    replaces that section whole. An override is `key.path=value`, its value read as YAML.

    Raises `ConfigError` with every problem found, each with the file and line or the override
    that it came from.
    """
    return _checked(read_config_file(path), overrides, str(path))


def config_of(data: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """The same from plain data, which `source` names in the error."""
    return _checked(Merged(data), overrides, source)


def _checked(merged: Merged, overrides: Sequence[str], source: str) -> Config:
    apply_overrides(merged, overrides)
    config, problems = validate(merged.data)
    texts = merged.problems + [_cite(problem, merged.sources) for problem in problems]
    if config is None or texts:
        raise ConfigError(texts, source)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _cite(problem: Problem, sources: dict[str, str]) -> str:
    cited = dict.fromkeys(sources[path] for path in problem.paths if path in sources)
    return f"{problem.text} ({', '.join(cited)})" if cited else problem.text
