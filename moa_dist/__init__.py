"""Distributed pretraining of Transformers with expert attention and expert feed-forward layers.

import moa_dist

config = moa_dist.load_config("configs/moeut/44m.yaml")
model = moa_dist.build_model(config.model)
output = model(tokens)  # logits [B, S, V], auxiliary losses and routing statistics as values
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_dist.config import load_config
    from moa_dist.evaluate.trained import load_model
    from moa_dist.models.language_model import build_model

__version__ = "0.1.0"
"""Version of the package; `pyproject.toml` takes it from here."""

__all__ = ["__version__", "build_model", "load_config", "load_model"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a configuration does not load torch."""
    if name == "load_config":
        from moa_dist.config import load_config

        return load_config
    if name == "build_model":
        from moa_dist.models.language_model import build_model

        return build_model
    if name == "load_model":
        from moa_dist.evaluate.trained import load_model

        return load_model
    raise AttributeError(f"module 'moa_dist' has no attribute '{name}'")
