"""Configuration: typed schema, loading, checks.

No library does this: pydantic validates the fields, but neither OmegaConf nor pydantic-settings
reports all problems at once with the YAML line of each and the key meant, or switches a section's
`kind` in a merge.
"""

from moa_dist.config import family
from moa_dist.config.layout_checks import find_layout_problems
from moa_dist.config.load import load_config, to_yaml
from moa_dist.config.run import Config

__all__ = ["Config", "family", "find_layout_problems", "load_config", "to_yaml"]
