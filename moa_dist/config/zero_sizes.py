"""How finely ZeRO cuts a model; no setting, but what planning and training must agree on."""

from __future__ import annotations

from typing import NamedTuple


class ZeroSizes(NamedTuple):
    """Sizes in elements; tests shrink them so that small models meet what large ones meet."""

    bucket: int = 50_000_000
    """Elements reduced at once. ZeRO 3 allocates them ahead, DeepSpeed's default would be 2 GB."""
    persistent: int = 100_000
    """Parameters of at most so many elements stay whole at ZeRO 3."""

    def overlapped_bucket(self, largest_parameter: int) -> int:
        """Bucket size in elements for ZeRO 1 and 2 that reduce while the backward pass runs.

        DeepSpeed 0.19 reduces a gradient that no bucket holds in place, on its reduction stream,
        and frees it without `record_stream`: the memory may be overwritten before it is read.
        So every gradient gets a bucket that it fits in.
        """
        return max(self.bucket, largest_parameter)


DEFAULT_ZERO_SIZES = ZeroSizes()
"""What training uses."""
