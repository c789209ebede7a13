"""Where an attention layer takes tokens to be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from moa_dist.config.section import Section


class RopeConfig(Section):
    """Rotary position embedding, rotate-half pairing."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each head's dimensions that is rotated; the width is rounded down to even."""
    base: PositiveFloat = 10000.0
    """Wavelength base."""
