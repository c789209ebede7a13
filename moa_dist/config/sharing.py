"""What layers that repeat share, and what every application of them has of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from moa_dist.config.section import Section

Own = Literal["attention", "ffn", "norms", "routers"]
"""Parts that an application of a shared layer may have of its own."""


class SharingConfig(Section):
    """How the layers between prelude and coda share parameters: whole, or part by part.

    Expert tying is `own: [attention, norms, routers]`: layers share the experts of their FFN alone.
    A relaxed recursive Transformer (Bae et al. 2024) is `own: [norms]` with an `adapter_rank`.
    """

    order: Literal["cycle", "sequence"] = "cycle"
    """Order in which the distinct layers A and B are applied: `cycle` ABAB, `sequence` AABB."""
    own: tuple[Own, ...] = ()
    """What every application has of its own; all else is shared. `attention` and `ffn` are whole
    parts, `norms` those around the parts, and `routers` those of the parts that are shared, whose
    experts are then chosen anew by every application."""
    adapter_rank: PositiveInt | None = None
    """Rank r of what every application adds to each shared matrix W of its dense projections, those
    of experts excluded: `W + B A` with A [r, d_in] and B [d_out, r] of its own (LoRA). B starts at
    zero, or at what `moa-dist share` finds. Null for no adapters."""
    vectors: bool = False
    """Whether every application adds a learned vector of its own to its input, by which it can tell
    where it is. They start at zero."""

    @property
    def is_partial(self) -> bool:
        """Whether an application has anything of its own."""
        return bool(self.own or self.adapter_rank or self.vectors)
