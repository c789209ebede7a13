"""Configuration: typed schema, loading, checks."""

from moa_dist.config.checks import find_layout_problems
from moa_dist.config.load import load_config, to_yaml
from moa_dist.config.run import Config

__all__ = ["Config", "find_layout_problems", "load_config", "to_yaml"]
