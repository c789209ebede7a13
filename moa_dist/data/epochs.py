"""How much of each source a run has read after some number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import PairManifest
from moa_dist.data.mixture import Mixture


class SourceRead(NamedTuple):
    """What a run has read of one source."""

    samples: int
    """Samples from this source."""
    share: float
    """Their share of the run's samples."""
    epochs: float
    """How often each sample of the source has been read, on average."""


def sources_read(
    folders: Sequence[DataFolder], mixture: Mixture, samples: int
) -> dict[str, SourceRead]:
    """Return what a run's first `samples` samples contain, by source.

    Empty for pairs, which are not read as samples. Damaged shards count as if they were intact.
    """
    counts = mixture.counts(samples)
    return {
        name: SourceRead(
            counts.get(name, 0),
            counts.get(name, 0) / max(samples, 1),
            counts.get(name, 0) / manifest.num_samples,
        )
        for name, _, manifest, _ in folders
        if not isinstance(manifest, PairManifest)
    }
