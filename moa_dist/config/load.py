"""Load a path and `key=value` overrides as a checked configuration, and dump it as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moa_dist.config.merge import Merged, apply_overrides, read_config_file
from moa_dist.config.run import Config
from moa_dist.config.validate import validate
from moa_dist.errors import ConfigError, Problem, Source


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and what it extends, apply overrides, and check everything.

    `extends:` names a file, or a list of files of which later ones win, relative to the file
    that contains it. Mappings merge key by key; choosing another `kind` of attention or FFN
    replaces that section entirely. An override is `key.path=value`, its value parsed as YAML.

    Raises ConfigError with every problem found, each with the file and line, or the override,
    that caused it.
    """
    return _checked(read_config_file(path), overrides, str(path))


def config_of(data: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """Apply overrides to plain data and check it; `source` is its name in the ConfigError."""
    return _checked(Merged(data), overrides, source)


def _checked(merged: Merged, overrides: Sequence[str], source: str) -> Config:
    apply_overrides(merged, overrides)
    config, problems = validate(merged.data)
    problems = merged.problems + [_cite(problem, merged.sources) for problem in problems]
    if config is None or problems:
        raise ConfigError(problems, source)
    return config


def to_yaml(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that `load_config` accepts."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _cite(problem: Problem, sources: dict[str, Source]) -> Problem:
    """Add where the keys were written; for a missing key, where the section around it was."""
    keys = [key for key in problem.keys if key in sources]
    if not keys:
        around = (key.rpartition(".")[0] for key in problem.keys)
        keys = [section for section in around if section in sources]
    return replace(problem, sources=tuple(dict.fromkeys(sources[key] for key in keys)))
